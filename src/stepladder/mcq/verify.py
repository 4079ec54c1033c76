"""Judge samples against the label. The only place that decides a verdict."""

from __future__ import annotations

from typing import NamedTuple

from stepladder.mcq.answer import strict
from stepladder.mcq.shuffle import Permutation, shown, to_original
from stepladder.records import LETTERS, Question, SampleVerdict


class Judged(NamedTuple):
    """The strict answer in the original order of the options, None if there is none, and the verdict."""

    answer: str | None
    verdict: SampleVerdict


def judge(question: Question, permutation: Permutation, text: str, *, finished: bool) -> Judged:
    """Compare a text's strict answer, put back into the original order of the options, with the label.

    Where two options have the same text and one of them is the label, both letters are right.

    Args:
        permutation: the order in which the options were shown.
        finished: whether the model ended the text itself; if not, a text without an answer is truncated.
    """
    letter = strict(text, shown(question.options, permutation)).letter
    if letter is None:
        return Judged(None, "unparsed" if finished else "truncated")
    answer = to_original(letter, permutation)
    right = question.answer is not None and _text(question, answer) == _text(question, question.answer)
    return Judged(answer, "accepted" if right else "wrong")


def _text(question: Question, letter: str) -> str:
    return question.options[LETTERS.index(letter)]
