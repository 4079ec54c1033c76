"""Predictions joined with labels: which system answered which question rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.config import BASE as BASE_FOLDER
from stepladder.config import Config
from stepladder.context import FINAL
from stepladder.errors import InputError, UserError
from stepladder.mcq.answer import lenient
from stepladder.records import Prediction, Question, read
from stepladder.reporting.content import HeldOut, Kind, SystemName, Weights


class System(NamedTuple):
    """A system that answers: the untuned base, a member before or after quantisation, or the ensemble."""

    kind: Kind
    member: str | None = None
    weights: Weights = "chosen"

    @property
    def label(self) -> SystemName:
        """The system as the report names it."""
        return SystemName(**self.fields)

    @property
    def fields(self) -> dict[str, Any]:
        """Its name as fields of a report's row; chosen weights are not named, so that reports without others stay."""
        final = {"weights": self.weights} if self.weights == "final" else {}
        return {"system": self.kind, "member": self.member} | final

    def path(self, run: Path, split: HeldOut) -> Path:
        """The file of the system's predictions, in the run folder ``run``."""
        if self.weights == "final":
            run /= FINAL
        if self.kind == "ensemble":
            return run / "ensemble" / f"{split}.jsonl"
        return run / "predictions" / (self.member or BASE_FOLDER) / f"{self.kind}.{split}.jsonl"


BASE = System("base")
ENSEMBLE = System("ensemble")
FINAL_ENSEMBLE = System("ensemble", weights="final")


@dataclass(frozen=True)
class Measured:
    """The labelled questions of one split, sorted by id, and every system's answers in the same order."""

    split: HeldOut
    questions: tuple[Question, ...]
    answers: dict[System, tuple[Prediction, ...]]

    @cached_property
    def right(self) -> dict[System, list[bool]]:
        """Whether each question was answered rightly, by system; an unparsed answer is wrong."""
        return {
            system: [row.answer == question.answer for row, question in zip(answers, self.questions, strict=True)]
            for system, answers in self.answers.items()
        }

    def leniently(self, system: System) -> int:
        """Number of right answers if the lenient rule reads those that the strict rule cannot: their first text, which
        has the options in their own order."""
        return sum(
            question.answer == (row.answer or lenient(row.texts[0], question.options).letter)
            for row, question in zip(self.answers[system], self.questions, strict=True)
        )

    def forced(self, system: System) -> int:
        """Number of right answers if those that the strict rule cannot read are the letter that was forced."""
        return sum(
            question.answer == row.letter for row, question in zip(self.answers[system], self.questions, strict=True)
        )

    def accuracy(self, system: System) -> float:
        right = self.right[system]
        return sum(right) / len(right)

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing: the mean of 1 / number of options."""
        return sum(1 / len(question.options) for question in self.questions) / len(self.questions)


def systems(config: Config) -> list[System]:
    """The systems of a run with its chosen weights, in the order they are shown."""
    members = [member.name for member in config.member]
    tuned = [System(kind, name) for kind in ("merged", "quantised") for name in members]
    return [BASE, *tuned, ENSEMBLE]


def load(run: Path, config: Config, leader: str, final: Sequence[str] = ()) -> list[Measured]:
    """The splits that can be measured: validation, and test if it has labels.

    Args:
        leader: the member that was chosen on validation.
        final: the members with final weights, which are measured on the test alone, since validation trained them.

    Raises:
        UserError: no validation question has a label.
        InputError: a system's predictions lack a labelled question.
    """
    splits: list[HeldOut] = ["validation"] if config.questions.test is None else ["validation", "test"]
    measured: list[Measured] = []
    for split in splits:
        questions = [row for row in read(run / "questions" / f"{split}.jsonl", Question) if row.answer is not None]
        if not questions and split == "validation":
            raise UserError("no validation question has a label; give more labelled problems or raise 'validation'")
        if questions:
            answering = systems(config)
            if split == "test" and config.predict.merged_test == "leader":
                answering = [system for system in answering if system.kind != "merged" or system.member == leader]
            if split == "test" and final:
                answering += [*(System("quantised", name, "final") for name in final), FINAL_ENSEMBLE]
            measured.append(_join(run, split, sorted(questions, key=lambda row: row.id), answering))
    return measured


def _join(run: Path, split: HeldOut, questions: list[Question], answering: list[System]) -> Measured:
    answers = {}
    for system in answering:
        path = system.path(run, split)
        by_id = {row.question_id: row for row in read(path, Prediction)}
        for question in questions:
            if question.id not in by_id:
                raise InputError(path, f"no answer to question {question.id}; remove the folder and run again")
        answers[system] = tuple(by_id[question.id] for question in questions)
    return Measured(split, tuple(questions), answers)
