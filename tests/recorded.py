"""The recorded right answers of the contest's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from replay_server import ANSWERS, QUESTIONS

from stepladder.mcq.answer import strict
from stepladder.mcq.questionfile import read_problems
from stepladder.records import Question, parse_lines


class RightAnswer(NamedTuple):
    """An answer whose strict letter is the label; its model was shown the options in their own order."""

    model: str
    sample_index: int
    """Among the model's answers to the question."""
    question: Question
    text: str


def questions_of(contest: Path) -> dict[str, Question]:
    """The contest's labelled questions, by id."""
    problems = read_problems(contest / QUESTIONS, "zh", labelled=True)
    return {question.id: question for problem in problems for question in problem.questions}


def right_answers(contest: Path, questions: Mapping[str, Question], step: int = 1) -> Iterator[RightAnswer]:
    """The right answers to these questions, on every ``step``-th line of the recordings."""
    for number, (_, row) in enumerate(parse_lines(contest / ANSWERS)):
        if number % step or (question := questions.get(row["id"])) is None:
            continue
        for index, text in enumerate(row["responses"]):
            if strict(text, question.options).letter == question.answer:
                yield RightAnswer(row["model"], index, question, text)
