"""One answer from several, by each rule, against answers counted by hand."""

from __future__ import annotations

import pytest

from stepladder.records import Prediction, Question
from stepladder.stages.ensemble import combine, decide, submission


@pytest.mark.parametrize(
    ("votes", "single", "vote", "leader"),
    [
        (("A", "B", "B"), "A", "B", "B"),  # the others agree: follow them
        (("A", "B", "C"), "A", "A", "A"),  # they do not: the leader
        (("A", "A", "B"), "A", "A", "A"),
        ((None, "B", "C"), None, "B", "B"),  # a leader that cannot be read does not decide
        (("A", None, None), "A", "A", "A"),  # others that agree on nothing decide nothing
        ((None, None, None), None, None, None),
        (("A",), "A", "A", "A"),
    ],
)
def test_rules(votes: tuple[str | None, ...], single: str | None, vote: str | None, leader: str | None) -> None:
    assert [decide(rule, 0, votes) for rule in ("single", "vote", "leader")] == [single, vote, leader]


def test_the_leader_may_stand_anywhere() -> None:
    assert decide("leader", 2, ("B", "C", "A")) == "A"
    assert decide("vote", 2, ("B", "C", "A")) == "A"


def row(question: str, member: str, answer: str | None) -> Prediction:
    return Prediction(question_id=question, member=member, votes=(answer,), answer=answer, texts=("t",))


def test_combined_predictions_keep_every_members_vote() -> None:
    given = {"x": [row("p#0", "x", "A")], "y": [row("p#0", "y", "B")], "z": [row("p#0", "z", "B")]}
    (combined,) = combine("leader", "x", given)
    assert combined.answer == "B"
    assert combined.votes == ("A", "B", "B")
    assert combined.member == "ensemble"


def test_the_answer_file_has_the_contests_format_and_an_answer_for_every_question() -> None:
    questions = [
        Question(
            id=f"p{n // 2}#{n % 2}", problem_id=f"p{n // 2}", problem="", question="", options=("1", "2"),
            language="en", source="s",
        )
        for n in range(3)
    ]  # fmt: skip
    answers = [row(q.id, "ensemble", letter) for q, letter in zip(questions, ("B", None, "A"), strict=True)]
    assert submission(questions, answers).splitlines() == [
        '{"id": "p0", "questions": [{"answer": "B"}, {"answer": "A"}]}',
        '{"id": "p1", "questions": [{"answer": "A"}]}',
    ]
