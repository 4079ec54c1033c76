"""Answer letters in equal shares, by showing the options of some chains in another order."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from stepladder.mcq.answer import with_final_line
from stepladder.mcq.prompts import worked_solution
from stepladder.mcq.shuffle import fixed, shown, to_shown
from stepladder.records import LETTERS, Question, Sample

WORKED_KEY = "worked:"

_COUNT = "一二两三四五六七八九十\\d"
_NAMED = (
    r"(?<![A-Za-z])[A-{last}](?![A-Za-z])"
    r"|(?i:[(\[][A-{last}][)\]]|^\s*[A-{last}][).:]|(?:\b(?:option|choice|answer)s?|选项|答案)\s*(?:[A-{last}]|\d+)\b"
    r"|\b(?:first|second|third|fourth|fifth|last|former|latter|next|previous)\s+(?:option|choice|answer|statement)s?\b)"
    rf"|(?:选项|答案)\s*[{_COUNT}](?![样致定])|第\s*[{_COUNT}]+\s*项"
    rf"|(?:第|最后|前面?|后面?|上面?|下面?)的?\s*[{_COUNT}]*\s*[个项]?(?:选项|答案)"
)
"""An option called by its letter, large or small, by its number or by its place."""


def balanced(pairs: Sequence[tuple[Question, Sample]]) -> list[Sample]:
    """The samples, some of them with the right option moved to the letter that is right least often so far.

    A chain can follow only where that is sound: a worked solution, which is written anew for any order, or a chain that
    names no option by letter or place before its answer line. Options that must keep their places do. Questions with as
    many options share their counts, so that those with two do not fill up A and B for all. Whoever has the least choice
    goes first; the others even out what that leaves.
    """
    choices = [_letters(question, sample) for question, sample in pairs]
    moved = [sample for _, sample in pairs]
    counts: dict[int, Counter[str]] = {}
    for index in sorted(range(len(pairs)), key=lambda index: len(choices[index])):
        question, sample = pairs[index]
        used = counts.setdefault(len(question.options), Counter())
        rarest = min(choices[index], key=lambda letter: (used[letter], letter))
        used[rarest] += 1
        moved[index] = _shown_at(question, sample, rarest)
    return moved


def _letters(question: Question, sample: Sample) -> list[str]:
    """The letters at which the sample's answer may be shown."""
    places = fixed(question).places
    if LETTERS.index(str(sample.answer)) in places or not _can_follow(question, sample):
        return [to_shown(str(sample.answer), sample.permutation)]
    return [LETTERS[index] for index in range(len(question.options)) if index not in places]


def _can_follow(question: Question, sample: Sample) -> bool:
    """Whether the sample's chain stays right when the options are shown in another order."""
    if _is_worked(sample):
        return worked_solution(question, sample.permutation) is not None
    chain, _, _ = _in_form(question, sample).rpartition("\n")
    named = _NAMED.replace("{last}", LETTERS[len(question.options) - 1])
    return re.search(named, unicodedata.normalize("NFKC", chain), re.MULTILINE) is None


def _shown_at(question: Question, sample: Sample, letter: str) -> Sample:
    """The sample with its answer shown at a letter."""
    here, there = (LETTERS.index(letter_) for letter_ in (to_shown(str(sample.answer), sample.permutation), letter))
    if here == there:
        return sample
    order = list(sample.permutation)
    order[here], order[there] = order[there], order[here]
    text = worked_solution(question, tuple(order)) if _is_worked(sample) else _in_form(question, sample)[:-1] + letter
    return sample.model_copy(update={"permutation": tuple(order), "text": text})


def _is_worked(sample: Sample) -> bool:
    return sample.key.startswith(WORKED_KEY)


def _in_form(question: Question, sample: Sample) -> str:
    """The sample's text, ending in its answer line with the letter alone at the end."""
    return with_final_line(sample.text, shown(question.options, sample.permutation), question.language)
