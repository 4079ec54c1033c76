"""Balance the answer letters of training samples by showing the options of some in another order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from stepladder.mcq.answer import with_final_line
from stepladder.mcq.prompts import worked_solution
from stepladder.mcq.shuffle import fixed, shown, to_shown
from stepladder.records import LETTERS, Question, Sample
from stepladder.text import nfkc

WORKED_KEY_PREFIX = "worked:"

_NUMERALS = "一二两三四五六七八九十\\d"
_OPTION_REFERENCE = (
    r"(?<![A-Za-z])[A-{last}](?![A-Za-z])"
    r"|(?i:[(\[][A-{last}][)\]]|^[^\S\n]*+[A-{last}][).:]|(?:\b(?:option|choice|answer)s?|选项|答案)\s*+(?:[A-{last}]|\d++)\b"
    r"|\b(?:first|second|third|fourth|fifth|last|former|latter|next|previous)\s++(?:option|choice|answer|statement)s?\b)"
    rf"|(?:选项|答案)\s*+[{_NUMERALS}](?![样致定])|第\s*+[{_NUMERALS}]++\s*+项"
    rf"|(?:第|最后|前面?|后面?|上面?|下面?)的?\s*+[{_NUMERALS}]*+\s*+[个项]?(?:选项|答案)"
)
"""An option referred to by its letter (upper or lower case), its number or its place; ``{last}`` is the last letter."""


def balanced(pairs: Sequence[tuple[Question, Sample]]) -> list[Sample]:
    """The samples, some with the right option moved to the letter that has been right least often so far.

    It is moved only where the chain stays right: in a worked solution, which is rendered again for any order, and in a
    chain that refers to no option by letter or place before its answer line. Fixed options keep their places. Letters
    are counted per number of options, so that questions with two do not use up A and B for the others. Samples with the
    fewest possible letters come first; the others make up for the imbalance they leave.
    """
    possible = [_possible_letters(question, sample) for question, sample in pairs]
    balanced_samples = [sample for _, sample in pairs]
    counts: dict[int, Counter[str]] = {}
    for index in sorted(range(len(pairs)), key=lambda index: len(possible[index])):
        question, sample = pairs[index]
        uses = counts.setdefault(len(question.options), Counter())
        rarest = min(possible[index], key=lambda letter: (uses[letter], letter))
        uses[rarest] += 1
        balanced_samples[index] = _with_answer_at(question, sample, rarest)
    return balanced_samples


def _possible_letters(question: Question, sample: Sample) -> list[str]:
    """The letters that the sample's answer may be moved to; its own alone where it must stay."""
    places = fixed(question).places
    if LETTERS.index(str(sample.answer)) in places or not _may_reorder(question, sample):
        return [to_shown(str(sample.answer), sample.permutation)]
    return [LETTERS[index] for index in range(len(question.options)) if index not in places]


def _may_reorder(question: Question, sample: Sample) -> bool:
    """Whether the sample's chain stays right with the options in another order."""
    if _is_worked(sample):
        return worked_solution(question, sample.permutation) is not None
    chain, _, _ = _with_final_line(question, sample).rpartition("\n")
    pattern = _OPTION_REFERENCE.replace("{last}", LETTERS[len(question.options) - 1])
    return re.search(pattern, nfkc(chain), re.MULTILINE) is None


def _with_answer_at(question: Question, sample: Sample, letter: str) -> Sample:
    """The sample with the options in an order that shows its answer at a letter."""
    current, target = (LETTERS.index(name) for name in (to_shown(str(sample.answer), sample.permutation), letter))
    if current == target:
        return sample
    order = list(sample.permutation)
    order[current], order[target] = order[target], order[current]
    text = (
        worked_solution(question, tuple(order))
        if _is_worked(sample)
        else _with_final_line(question, sample)[:-1] + letter
    )
    return sample.model_copy(update={"permutation": tuple(order), "text": text})


def _is_worked(sample: Sample) -> bool:
    return sample.key.startswith(WORKED_KEY_PREFIX)


def _with_final_line(question: Question, sample: Sample) -> str:
    """The sample's text, ending in the answer line, whose last character is the letter."""
    return with_final_line(sample.text, shown(question.options, sample.permutation), question.language)
