"""Which problems a package is tested with, and the letters they carry."""

from __future__ import annotations

import json

import pytest

from stepladder.errors import UserError
from stepladder.packaging import selftest
from stepladder.records import Prediction, Question


def question(name: str) -> Question:
    return Question(
        id=name, problem_id=name.partition("#")[0], problem="A circle is red.", question="Which colour?",
        options=("red", "blue"), answer="A", language="en", source="s",
    )  # fmt: skip


def prediction(name: str, answer: str | None, forced: str | None = None) -> Prediction:
    return Prediction(question_id=name, member="m", votes=(answer,), answer=answer, forced=forced, texts=("",))


def test_a_forced_letter_is_an_answer_and_problems_without_differences_come_first() -> None:
    names = ["p#0", "p#1", "q#0", "r#0"]
    run = [prediction("p#0", "B"), prediction("p#1", None), prediction("q#0", None, "A"), prediction("r#0", None)]
    member = [prediction("p#0", "A"), prediction("p#1", "A"), prediction("q#0", None, "A"), prediction("r#0", "A")]
    lines = selftest.labelled_problems([question(name) for name in names], [run, member]).splitlines()
    labels = {row["id"]: [asked["answer"] for asked in row["questions"]] for row in map(json.loads, lines)}
    assert list(labels.items()) == [("q", ["A"]), ("p", ["B"])]


def test_a_run_without_a_letter_cannot_be_compared_with() -> None:
    with pytest.raises(UserError, match="no validation question got a letter"):
        selftest.labelled_problems([question("p#0")], [[prediction("p#0", None)]])
