"""A package's self-test: what it answered on the machine that packed it, and what that says about another machine.

On the very machine, in the same number format, answers are the same bytes. Elsewhere kernels differ, and a near tie may
fall the other way: then a share of the letters must be the same, of questions whose letters even quantising left alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import models
from stepladder.answering import team as teams
from stepladder.answering.client import FolderClient
from stepladder.answering.standalone import answer, read_settings
from stepladder.errors import GateError, InputError
from stepladder.mcq.questionfile import read_problems
from stepladder.progress import Progress
from stepladder.records import Prediction, Question
from stepladder.workspace import write_atomic

QUESTIONS = "selftest.jsonl"
EXPECTED = "selftest.expected.json"
LEAST = 0.9
"""Share of the letters that must be the same on another kind of machine."""


class Expected(NamedTuple):
    """What a package answered when it was made."""

    machine: dict[str, str]
    """Who computed (:func:`stepladder.models.machine`)."""
    letters: dict[str, str | None]
    """By id of the question."""


def record(package: Path, progress: Progress) -> None:
    """Let a package that is being made answer its self-test, in this process, and write down what it said.

    Raises:
        GateError: it does not answer as the run did.
    """
    team = teams.find(str(package))
    how = read_settings(team.members[team.leader], None)
    how = how._replace(predict=how.predict.model_copy(update={"engine": "local"}), prompts=team.prompts)
    problems = read_problems(package / QUESTIONS, how.language, labelled=True)
    questions = [question for problem in problems for question in problem.questions]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder, "ledger.sqlite")
        with FolderClient(ledger, "selftest", Path(folder), how.serve, how.predict.dtype, progress) as client:
            given = {name: answer(client, weights, questions, how) for name, weights in team.members.items()}
    joined = team.join({name: answered.predictions for name, answered in given.items()})
    same = sum(question.answer == said.answer for question, said in zip(questions, joined, strict=True))
    if same < LEAST * len(questions):
        raise GateError(
            f"the package answers {same} of {len(questions)} questions as the run did; the run was made on another "
            "kind of machine, or its files were changed: run it again here"
        )
    letters = {said.question_id: said.answer for said in joined}
    found = Expected(models.machine(how.predict.dtype), letters)
    write_atomic(package / EXPECTED, json.dumps(found._asdict(), indent=1, ensure_ascii=False) + "\n")


def check(
    path: Path, machine: dict[str, str] | None, given: Sequence[Prediction], questions: Sequence[Question]
) -> str:
    """Hold answers against those of :func:`record`; what was compared, in words.

    Args:
        path: the file it wrote.
        machine: who computed (:func:`stepladder.models.machine`); None: it was not computed in this process.
        given: the answers.
        questions: what was asked, in the same order, with the run's own letters.

    Raises:
        InputError: the file cannot be read.
        GateError: on the machine that packed, a letter differs; elsewhere, more than a tenth of them.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        expected = Expected(dict(content["machine"]), dict(content["letters"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(path, f"cannot be read ({error}); make the package again with 'stepladder pack'") from None
    differ = [said.question_id for said in given if expected.letters.get(said.question_id) != said.answer]
    if machine == expected.machine:
        if differ:
            raise GateError(
                f"{len(differ)} of {len(given)} answers are not what this package gave on this very machine, "
                f"{differ[0]} first; its files or its libraries were changed: install it again"
            )
        return f"all {len(given)} answers as when it was packed, on this machine"
    same = sum(question.answer == said.answer for question, said in zip(questions, given, strict=True))
    if same < LEAST * len(given):
        raise GateError(f"{same} of {len(given)} answers are those of the run, less than {LEAST:.0%}")
    here = "a server" if machine is None else machine["dtype"]
    return (
        f"{same} of {len(given)} answers are those of the run; packed on another kind of machine "
        f"({expected.machine['dtype']}, here {here}), so a near tie may fall the other way"
    )
