"""A package's self-test: the answers it gave on the machine that packed it, and the comparison with those given later.

On the same machine and in the same number format all letters must be the same. Elsewhere kernels differ and a near tie
may fall the other way, so only a share of the letters must agree, preferably on questions whose letters did not change
by quantising either.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from stepladder import models
from stepladder.answering import team as teams
from stepladder.answering.client import FolderClient
from stepladder.answering.standalone import answer, read_settings
from stepladder.documents import Document
from stepladder.errors import GateError, UserError
from stepladder.mcq.questionfile import read_problems
from stepladder.progress import Progress
from stepladder.records import Prediction, Question

QUESTIONS = "selftest.jsonl"
MAX_PROBLEMS = 8
MIN_AGREEMENT = 0.9
"""Share of the letters that must be the same on another kind of machine."""


class ExpectedAnswers(Document):
    """What a package answered when it was made."""

    FILE: ClassVar[str] = "selftest.expected.json"

    machine: Mapping[str, str]
    """Who computed (:func:`stepladder.models.machine`)."""
    letters: Mapping[str, str | None]
    """By id of the question."""


def labelled_problems(questions: Sequence[Question], predictions: Sequence[Sequence[Prediction]]) -> str:
    """Problems in the contest's form, as JSONL, with the run's letters as labels. Problems that all members answered
    alike, before and after quantising, come first: another machine's rounding will hardly change those.

    Args:
        questions: of the validation split.
        predictions: the run's answers, and those of each member before and after quantising, in the same order.

    Raises:
        UserError: no question has a letter.
    """
    lines: dict[bool, list[str]] = {True: [], False: []}
    rows = zip(questions, *predictions, strict=True)
    for name, group in groupby(rows, key=lambda row: row[0].problem_id):
        answered = [(question, answers) for question, *answers in group if answers[0].letter is not None]
        kept = [{"question": q.question, "options": q.options, "answer": a[0].letter} for q, a in answered]
        if kept:
            row = {"id": name, "problem": answered[0][0].problem, "questions": kept}
            unanimous = all(len({answer.letter for answer in answers}) == 1 for _, answers in answered)
            lines[unanimous].append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines[True] + lines[False]:
        raise UserError(
            "no validation question got a letter, so the package's answers could not be compared with the run's; look "
            "at the answers in the report"
        )
    return "".join([*lines[True], *lines[False]][:MAX_PROBLEMS])


def record(package: Path, progress: Progress) -> None:
    """Answer the self-test with a package that is being made, in this process, and write the answers into it.

    Raises:
        GateError: it does not answer as the run did.
    """
    team = teams.find(str(package))
    settings = read_settings(team.members[team.leader], None)
    predict = settings.predict.model_copy(update={"engine": "local"})
    settings = settings._replace(predict=predict, prompts=team.prompts)
    problems = read_problems(package / QUESTIONS, settings.language, labelled=True)
    questions = [question for problem in problems for question in problem.questions]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder, "ledger.sqlite")
        with FolderClient(ledger, "selftest", Path(folder), settings.serve, predict.dtype, progress) as client:
            by_member = {name: answer(client, weights, questions, settings) for name, weights in team.members.items()}
    predictions = team.join(by_member)
    same = _as_labelled(predictions, questions)
    if same < MIN_AGREEMENT * len(questions):
        raise GateError(
            f"the package answers {same} of {len(questions)} questions as the run did; the run was made on another "
            "kind of machine, or its files were changed: run it again here"
        )
    letters = {prediction.question_id: prediction.letter for prediction in predictions}
    ExpectedAnswers(machine=models.machine(predict.dtype), letters=letters).write(package)


def check(
    path: Path, machine: Mapping[str, str] | None, predictions: Sequence[Prediction], questions: Sequence[Question]
) -> str:
    """Compare answers with those that :func:`record` wrote; returns the result as a sentence.

    Args:
        path: the file it wrote.
        machine: who computed (:func:`stepladder.models.machine`); None: it was not computed in this process.
        predictions: the answers.
        questions: what was asked, in the same order, labelled with the run's answers.

    Raises:
        InputError: the file cannot be read.
        GateError: on the machine that packed, a letter differs; elsewhere, more than a tenth of them.
    """
    expected = ExpectedAnswers.read_file(path, "make the package again with 'stepladder pack'")
    count = len(predictions)
    differ = [row.question_id for row in predictions if expected.letters.get(row.question_id) != row.letter]
    if machine == expected.machine:
        if differ:
            raise GateError(
                f"{len(differ)} of {count} answers are not what this package gave on this very machine, "
                f"{differ[0]} first; its files or its libraries were changed: install it again"
            )
        return f"all {count} answers as when it was packed, on this machine"
    same = _as_labelled(predictions, questions)
    if same < MIN_AGREEMENT * count:
        raise GateError(f"{same} of {count} answers are those of the run, less than {MIN_AGREEMENT:.0%}")
    computed_in = "on a server" if machine is None else f"in {machine['dtype']}"
    return (
        f"{same} of {count} answers are those of the run; it was packed on another kind of machine (computed in "
        f"{expected.machine['dtype']}, here {computed_in}), so a near tie may fall the other way"
    )


def _as_labelled(predictions: Sequence[Prediction], questions: Sequence[Question]) -> int:
    """How many answers equal the label."""
    return sum(row.letter == question.answer for question, row in zip(questions, predictions, strict=True))
