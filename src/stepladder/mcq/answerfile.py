"""The answer file in the contest's format: one line per problem, with its id and the letters of its questions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from stepladder.records import Prediction, Question


def submission(questions: Sequence[Question], predictions: Sequence[Prediction]) -> str:
    """The text of the answer file; "A" where no answer could be read, since an empty one is always wrong."""
    problems: dict[str, list[dict[str, str]]] = defaultdict(list)
    for question, prediction in zip(questions, predictions, strict=True):
        problems[question.problem_id].append({"answer": prediction.letter or "A"})
    return "".join(
        json.dumps({"id": problem, "questions": letters}, ensure_ascii=False) + "\n"
        for problem, letters in problems.items()
    )


def problems_in(answers: bytes) -> object:
    """(id, number of questions) of every problem of an answer file; None if the bytes are not an answer file."""
    try:
        rows = [json.loads(line) for line in answers.splitlines()]
        return [(row["id"], len(row["questions"])) for row in rows]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
