"""Decisions about labels: which hold, which do not any more, and when people disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_questions import Stage, line, problem, stage

from stepladder import records
from stepladder.mcq.questionfile import read_questions
from stepladder.mcq.reviews import Action, Decision, Review, evidence_of, standing
from stepladder.records import Question

__all__ = ["stage"]  # a fixture


def test_a_decision_about_another_text_or_label_does_not_hold(stage: Stage) -> None:
    train = [problem(f"p#{n}", line(), line(question="And who else?")) for n in range(4)]
    stage.write(train=train)
    (seen,) = read_questions([Path("train.jsonl")], {"p#1#0"}, "en")
    common = {"id": "p#1#0", "action": "drop", "label": seen.answer, "evidence": evidence_of(seen)}
    for changes, kept in (({}, False), ({"label": "B"}, True), ({"evidence": "0" * 16}, True)):
        stage.write(train=train, reviewed=[common | changes])
        assert stage.run() == 0
        rows = [
            row for split in ("train", "validation") for row in records.read(stage.made / f"{split}.jsonl", Question)
        ]
        assert ("p#1#0" in {row.id for row in rows}) == kept
        audit = json.loads((stage.made / "audit.json").read_text())
        assert audit["counts"].get("decision about another question", 0) == kept


def test_reviewers_who_disagree_stop_the_stage_until_that_is_settled(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [problem(f"p#{n}", line(), line(question="And who else?")) for n in range(4)]
    decided = [
        {"id": "p#0#0", "action": "keep", "reviewer": "Ann"},
        {"id": "p#0#0", "action": "relabel", "answer": "B", "reviewer": "Bob"},
    ]
    stage.write(train=train, reviewed=decided)
    assert stage.run() == 2
    said = capsys.readouterr().err
    assert "reviewed.jsonl:2: Ann (keep), Bob (relabel) disagree about p#0#0; settle it in 'stepladder view'" in said
    settled = {"id": "p#0#0", "action": "drop", "reviewer": "Cleo", "settles": True}
    for more in ([{"id": "p#0#0", "action": "undo", "reviewer": "Bob"}], [settled]):
        stage.write(train=train, reviewed=[*decided, *more])
        assert stage.run() == 0


def made_by(reviewer: str, action: Action, *, settles: bool = False) -> Decision:
    return Decision("q", action, reviewer=reviewer, settles=settles)


LOG = (
    (made_by("Ann", "keep"), Review("keep"), False),
    (made_by("Bob", "skip"), Review("keep"), False),
    (made_by("Bob", "drop"), None, True),
    (made_by("Bob", "undo"), Review("keep"), False),
    (made_by("Bob", "drop"), None, True),
    (made_by("Cleo", "keep", settles=True), Review("keep"), False),
    (made_by("Cleo", "undo"), None, True),
    (made_by("Ann", "drop"), Review("drop"), False),
    (made_by("Ann", "undo"), None, True),
    (made_by("Ann", "undo"), Review("drop"), False),
    (made_by("Ann", "undo"), Review("drop"), False),
    (made_by("Bob", "skip"), None, False),
)
"""Decisions one after another, what holds then, and whether reviewers disagree."""


@pytest.mark.parametrize("count", range(1, len(LOG) + 1))
def test_what_holds_follows_from_each_reviewer_s_last_decision(count: int) -> None:
    found = standing(decision for decision, _, _ in LOG[:count])["q"]
    assert (found.review, found.is_conflict) == LOG[count - 1][1:]
