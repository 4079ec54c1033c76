"""Is a sample right? The one place that says why not."""

from __future__ import annotations

from typing import NamedTuple

from stepladder.mcq.answer import strict
from stepladder.mcq.shuffle import Permutation, shown, to_original
from stepladder.records import LETTERS, Question, SampleVerdict


class Judged(NamedTuple):
    """The strict answer in the original option order, and the verdict."""

    answer: str | None
    verdict: SampleVerdict


def judge(question: Question, permutation: Permutation, text: str, *, finished: bool) -> Judged:
    """Compare a text's strict answer with the label, undoing the option order it was asked in.

    Where two options are the same text, either letter is right if one of them is the label.
    """
    letter = strict(text, shown(question.options, permutation)).letter
    if letter is None:
        return Judged(None, "unparsed" if finished else "truncated")
    answer = to_original(letter, permutation)
    right = question.answer is not None and _text(question, answer) == _text(question, question.answer)
    return Judged(answer, "accepted" if right else "wrong")


def _text(question: Question, letter: str) -> str:
    return question.options[LETTERS.index(letter)]
