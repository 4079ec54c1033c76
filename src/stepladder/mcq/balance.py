"""Answer letters in equal shares, by showing the options of some chains in another order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from stepladder.mcq.answer import as_asked
from stepladder.mcq.prompts import worked_solution
from stepladder.mcq.shuffle import Permutation, fixed, shown, to_shown
from stepladder.records import LETTERS, Question, Sample

WORKED_KEY = "worked:"


def balanced(pairs: Sequence[tuple[Question, Sample]]) -> list[Sample]:
    """The samples, some of them with the right option moved to the letter that is right least often so far.

    A chain can follow only where that is sound: a worked solution, which is written anew for any order, or a chain that
    names no letter before its answer line. Options that must keep their places do. Questions with as many options
    share their counts, so that those with two do not fill up A and B for all.
    """
    counts: dict[int, Counter[str]] = {}
    moved = []
    for question, sample in pairs:
        used = counts.setdefault(len(question.options), Counter())
        free = set(range(len(question.options))) - fixed(question).places
        if sample.answer is not None and LETTERS.index(sample.answer) in free:
            rarest = min((LETTERS[at] for at in free), key=lambda letter: (used[letter], letter))
            chosen = _shown_at(question, sample, rarest) or sample
        else:
            chosen = sample
        used[to_shown(str(chosen.answer), chosen.permutation)] += 1
        moved.append(chosen)
    return moved


def _shown_at(question: Question, sample: Sample, letter: str) -> Sample | None:
    """The sample with its answer shown at another letter, or None where its chain cannot follow."""
    here, there = (LETTERS.index(at) for at in (to_shown(str(sample.answer), sample.permutation), letter))
    if here == there:
        return sample
    order = list(sample.permutation)
    order[here], order[there] = order[there], order[here]
    text = _follow(question, sample, tuple(order), letter)
    return None if text is None else sample.model_copy(update={"permutation": tuple(order), "text": text})


def _follow(question: Question, sample: Sample, order: Permutation, letter: str) -> str | None:
    if sample.key.startswith(WORKED_KEY):
        return worked_solution(question, order)
    options = shown(question.options, sample.permutation)
    chain, _, line = as_asked(sample.text, options, question.language).rpartition("\n")
    if re.search(rf"(?<![A-Za-z])[A-{LETTERS[len(options) - 1]}](?![A-Za-z])", chain):
        return None
    return f"{chain}\n{line[:-1]}{letter}"
