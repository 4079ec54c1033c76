"""Finished models that answer as one: a model folder alone, or a package's members and the rule chosen for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from stepladder import models
from stepladder.documents import Document
from stepladder.ensembling.rules import RULES, ballot, ballot_of
from stepladder.records import LETTERS, Prediction, Question, Record

WEIGHTS = "model"
"""Folder of a package that has one folder a member."""

Votes = tuple[str | None, ...]


class ValidationAnswers(Record):
    """What the members answered to the validation questions: a rule is fitted on it."""

    right: tuple[str, ...]
    """The label of each question."""
    votes: Mapping[str, tuple[Votes, ...]]
    """Each member's votes on each question."""
    likely: Mapping[str, tuple[Mapping[str, float], ...]]
    """How likely each member found each letter (:class:`stepladder.records.Prediction`)."""


class PackedEnsemble(Document):
    """A package's members, and the rule that makes one answer of theirs."""

    FILE: ClassVar[str] = "ensemble.json"

    rule: str
    leader: str
    members: tuple[str, ...]
    known: ValidationAnswers | None = None
    """None for a single member."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}")
        if self.leader not in self.members:
            raise ValueError(f"the leader {self.leader!r} is not a member")
        for member in self.members if len(self.members) > 1 else ():
            if self.known is None or member not in self.known.votes or member not in self.known.likely:
                raise ValueError(f"the validation answers of member {member!r} are missing")
        return self


class Team(NamedTuple):
    """Models by the names of the members."""

    members: Mapping[str, Path]
    rule: str = "single"
    leader: str = ""
    """The member whose answer is taken where the rule gives none."""
    validation: ValidationAnswers | None = None
    """None where the leader answers alone."""
    prompts: Path | None = None
    """A package's prompts, which take precedence over those of its members."""

    def join(self, predictions: Mapping[str, Sequence[Prediction]]) -> list[Prediction]:
        """One prediction a question from the members' predictions, all in the same order."""
        if self.validation is None:
            return [*predictions[self.leader]]
        votes = [self.validation.votes[name] for name in self.members]
        likely = [self.validation.likely[name] for name in self.members]
        right = np.array([LETTERS.index(letter) for letter in self.validation.right])
        fitted = RULES[self.rule](ballot([*self.members], votes, LETTERS, likely), right)
        letters = fitted(ballot_of({name: predictions[name] for name in self.members}))
        return [
            own if letter < 0 else own.model_copy(update={"answer": LETTERS[letter], "forced": None})
            for letter, own in zip(letters, predictions[self.leader], strict=True)
        ]


def find(name: str) -> Team:
    """The team of a package's folder, or of a model folder or an id on a hub alone.

    Raises:
        InputError: the package's file cannot be read.
        ModelError: a member's folder is not there or not a model.
    """
    folder = Path(name).expanduser()
    if not (folder / PackedEnsemble.FILE).is_file():
        return Team({WEIGHTS: models.locate(name)}, leader=WEIGHTS)
    packed = PackedEnsemble.read(folder, "make the package again with 'stepladder pack'")
    members = {member: folder / WEIGHTS / member for member in packed.members}
    for weights in members.values():
        models.locate(str(weights))
    return Team(members, packed.rule, packed.leader, packed.known if len(members) > 1 else None, folder / "prompts")


def write(folder: Path, team: Team) -> None:
    """Write what :func:`find` reads."""
    packed = PackedEnsemble(
        rule=team.rule,
        leader=team.leader,
        members=tuple(team.members),
        **({} if team.validation is None else {"known": team.validation}),
    )
    packed.write(folder)


def validation_answers(
    questions: Sequence[Question], predictions: Mapping[str, Sequence[Prediction]]
) -> ValidationAnswers:
    """What a rule is fitted on, from labelled questions and each member's predictions for them."""
    return ValidationAnswers(
        right=tuple(str(question.answer) for question in questions),
        votes={name: tuple(row.votes for row in rows) for name, rows in predictions.items()},
        likely={name: tuple(row.likely for row in rows) for name, rows in predictions.items()},
    )
