"""Finished models that answer as one: a model folder alone, or a package's members and the rule chosen for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepladder import models
from stepladder.ensembling.rules import RULES, ballot, ballot_of
from stepladder.errors import InputError
from stepladder.records import LETTERS, Prediction, Question
from stepladder.workspace import write_atomic

FILE = "ensemble.json"
WEIGHTS = "model"
"""Folder of a package that has one folder a member."""

Votes = tuple[str | None, ...]


class Known(NamedTuple):
    """What members answered to questions whose letters are known: a rule is fitted on it."""

    right: tuple[str, ...]
    """The letter of each question."""
    votes: Mapping[str, Sequence[Votes]]
    """Each member's votes on each question."""
    likely: Mapping[str, Sequence[Mapping[str, float]]]
    """How likely each member found each letter (:class:`stepladder.records.Prediction`)."""


class Team(NamedTuple):
    """Models by the names of the members."""

    members: Mapping[str, Path]
    rule: str = "single"
    leader: str = ""
    """Whose answer stands where the rule finds none."""
    known: Known | None = None
    prompts: Path | None = None
    """A package's prompts, which take precedence over those of its members."""

    def join(self, given: Mapping[str, Sequence[Prediction]]) -> list[Prediction]:
        """One prediction a question from the members' predictions, all in the same order."""
        if self.known is None:
            return [*given[self.leader]]
        votes = [self.known.votes[name] for name in self.members]
        known = ballot([*self.members], votes, LETTERS, [self.known.likely[name] for name in self.members])
        right = np.array([LETTERS.index(letter) for letter in self.known.right])
        chosen = RULES[self.rule](known, right)(ballot_of({name: given[name] for name in self.members}))
        return [
            own if letter < 0 else own.model_copy(update={"answer": LETTERS[letter]})
            for letter, own in zip(chosen, given[self.leader], strict=True)
        ]


def find(name: str) -> Team:
    """The team of a package's folder, or of a model folder or an id on a hub alone.

    Raises:
        InputError: the package's file cannot be read.
        ModelError: a member's folder is not there or not a model.
    """
    folder = Path(name).expanduser()
    path = folder / FILE
    if not path.is_file():
        return Team({WEIGHTS: models.locate(name)}, leader=WEIGHTS)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        members = {str(member): folder / WEIGHTS / member for member in content["members"]}
        known = None
        if len(members) > 1:
            kept = content["known"]
            votes = {name: [*map(tuple, kept["votes"][name])] for name in members}
            known = Known(tuple(kept["right"]), votes, {name: kept["likely"][name] for name in members})
        team = Team(members, content["rule"], content["leader"], known, folder / "prompts")
        if team.rule not in RULES or team.leader not in members:
            raise ValueError(f"no rule {team.rule!r}, or no member {team.leader!r}")
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(path, f"cannot be read ({error}); make the package again with 'stepladder pack'") from None
    for weights in members.values():
        models.locate(str(weights))
    return team


def write(folder: Path, team: Team) -> None:
    """Write what :func:`find` reads."""
    content: dict[str, Any] = {"rule": team.rule, "leader": team.leader, "members": [*team.members]}
    if team.known is not None:
        content["known"] = team.known._asdict()
    write_atomic(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def learned(questions: Sequence[Question], given: Mapping[str, Sequence[Prediction]]) -> Known:
    """What a rule is fitted on: labelled questions and the members' predictions for them."""
    return Known(
        tuple(str(question.answer) for question in questions),
        {name: [row.votes for row in rows] for name, rows in given.items()},
        {name: [row.likely for row in rows] for name, rows in given.items()},
    )
