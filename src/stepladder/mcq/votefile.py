"""Votes recorded anywhere, as a file: who named which letters for which question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder import records
from stepladder.errors import InputError
from stepladder.mcq.labels import Votes
from stepladder.records import LETTERS


def read_votes(path: Path) -> tuple[dict[str, Votes], dict[str, str]]:
    """Votes by question and model, and the label of every question.

    A line is ``{"id", "gold", "votes": {model: [letters]}}``; an entry that is no letter is an answer nobody
    could read.

    Raises:
        InputError: naming file, line and field.
    """
    said: dict[str, Votes] = {}
    labels: dict[str, str] = {}
    for number, row in records.parse_lines(path):

        def wrong(field: str, problem: str, line: int = number) -> InputError:
            return InputError(path, problem, line=line, field=field)

        if not isinstance(row, dict):
            raise InputError(path, 'is not an object {"id", "gold", "votes"}', line=number)
        if not isinstance(row.get("id"), str) or not row["id"]:
            raise wrong("id", "must be a text that is not empty")
        if row["id"] in said:
            raise wrong("id", f"{row['id']!r} was used before; one line a question")
        if _letter(row.get("gold")) is None:
            raise wrong("gold", f"{row.get('gold')!r} is no letter from A to Z")
        votes = row.get("votes")
        if not isinstance(votes, dict) or not all(isinstance(given, list) for given in votes.values()):
            raise wrong("votes", 'must be an object of lists, such as {"a-model": ["A", "B", "A"]}')
        said[row["id"]] = {model: [_letter(entry) for entry in given] for model, given in votes.items()}
        labels[row["id"]] = row["gold"]
    if not said:
        raise InputError(path, "holds no votes; one JSON object a line is expected")
    return said, labels


def _letter(entry: Any) -> str | None:
    return entry if isinstance(entry, str) and len(entry) == 1 and entry in LETTERS else None
