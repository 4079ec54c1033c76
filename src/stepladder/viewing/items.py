"""A question as the pages show it: its votes, its chains for and against the label, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stepladder.mcq.reviews import Standing
from stepladder.mcq.shuffle import shown
from stepladder.records import LETTERS, Question, Sample
from stepladder.viewing import marks
from stepladder.viewing.index import Whole


class Bar(NamedTuple):
    """An option's votes."""

    letter: str
    text: str
    votes: int
    share: float
    is_label: bool
    is_suggested: bool


class Chain(NamedTuple):
    """A chain as it is shown."""

    sample: Sample
    accepted: bool
    text: Any


class Item(NamedTuple):
    """A question as it is shown."""

    whole: Whole
    question: Question
    """With the label of the question file, whatever was decided."""
    bars: Sequence[Bar]
    sides: Mapping[str, Sequence[Chain]]
    """Chains for the label, against it, and those without a letter."""
    standing: Standing | None
    is_stale: bool
    holder: str | None
    """The reviewer who has it on the screen, if there is one."""


def item_of(whole: Whole, question: Question, standing: Standing | None, holder: str | None) -> Item:
    """A question, with the label of the question file, as it is shown."""
    is_stale = standing is not None and is_out_of_date(question, standing)
    bars, sides = _bars(whole, question.answer), _sides(whole, question.answer)
    return Item(whole, question, bars, sides, standing, is_stale, holder)


def as_in_file(question: Question, standing: Standing) -> Question:
    """A run's question with the label of the question file: a run that has gone on from a decision has the new one."""
    seen = {decision.label for decision in standing.by_reviewer.values() if decision.label}
    review = standing.review if question.reviewed else None
    is_new = review is not None and review.answer == question.answer
    return question.model_copy(update={"answer": seen.pop()}) if is_new and len(seen) == 1 else question


def is_out_of_date(question: Question, standing: Standing) -> bool:
    """Whether the question, as the file has it, is not the one that somebody decided about."""
    return any(decision.is_stale(question) for decision in standing.by_reviewer.values())


def _bars(whole: Whole, label: str | None) -> list[Bar]:
    letters = [sample.answer for sample, _ in whole.chains if sample.answer is not None]
    letters += [] if letters else [a.prediction.letter for a in whole.answers if a.prediction.letter is not None]
    return [
        Bar(
            letter, text, letters.count(letter), letters.count(letter) / max(1, len(letters)), letter == label,
            letter == whole.row.suggested,
        )
        for letter, text in zip(LETTERS, whole.question.options, strict=False)
    ]  # fmt: skip


def _sides(whole: Whole, label: str | None) -> dict[str, list[Chain]]:
    sides: dict[str, list[Chain]] = {"for": [], "against": [], "unread": []}
    for sample, accepted in whole.chains:
        options = shown(whole.question.options, sample.permutation)
        side = "unread" if sample.answer is None else "for" if sample.answer == label else "against"
        sides[side].append(Chain(sample, accepted, marks.chain(sample.text, options)))
    return sides
