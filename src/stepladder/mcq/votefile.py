"""The file of recorded votes: the letters that each model gave for each question, wherever they were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder import records
from stepladder.errors import InputError
from stepladder.mcq.labels import Votes
from stepladder.records import LETTERS


def read_votes(path: Path) -> tuple[dict[str, Votes], dict[str, str]]:
    """Read a file with lines ``{"id", "gold", "votes": {model: [letters]}}``; an entry that is not a letter is an
    answer that could not be read.

    Returns:
        Votes by question id and model, and labels by question id.

    Raises:
        InputError: naming file, line and field.
    """
    votes_by_question: dict[str, Votes] = {}
    labels: dict[str, str] = {}
    for number, row in records.parse_lines(path):

        def wrong(field: str, problem: str, line: int = number) -> InputError:
            return InputError(path, problem, line=line, field=field)

        if not isinstance(row, dict):
            raise InputError(path, 'is not an object {"id", "gold", "votes"}', line=number)
        if not isinstance(row.get("id"), str) or not row["id"]:
            raise wrong("id", "must be a text that is not empty")
        if row["id"] in votes_by_question:
            raise wrong("id", f"{row['id']!r} was used before; one line a question")
        if _letter(row.get("gold")) is None:
            raise wrong("gold", f"{row.get('gold')!r} is not a letter from A to Z")
        votes = row.get("votes")
        if not isinstance(votes, dict) or not all(isinstance(letters, list) for letters in votes.values()):
            raise wrong("votes", 'must be an object of lists, such as {"a-model": ["A", "B", "A"]}')
        votes_by_question[row["id"]] = {
            model: [_letter(entry) for entry in letters] for model, letters in votes.items()
        }
        labels[row["id"]] = row["gold"]
    if not votes_by_question:
        raise InputError(path, "holds no votes; one JSON object a line is expected")
    return votes_by_question, labels


def _letter(entry: Any) -> str | None:
    return entry if isinstance(entry, str) and len(entry) == 1 and entry in LETTERS else None
