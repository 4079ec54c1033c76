"""Is a sample right? The one place that says why not."""

from __future__ import annotations

from typing import NamedTuple

from stepladder.mcq.answer import strict
from stepladder.mcq.shuffle import Permutation, to_original
from stepladder.records import Question, Verdict


class Judged(NamedTuple):
    """The strict answer in the original option order, and the verdict."""

    answer: str | None
    verdict: Verdict


def judge(question: Question, permutation: Permutation, text: str, *, finished: bool) -> Judged:
    """Compare a text's strict answer with the label, undoing the option order it was asked in."""
    letter = strict(text, len(question.options)).letter
    if letter is None:
        return Judged(None, "unparsed" if finished else "truncated")
    answer = to_original(letter, permutation)
    return Judged(answer, "accepted" if answer == question.answer else "wrong")
