"""``stepladder audit``: votes recorded anywhere -> labels ranked by the evidence against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepladder import records
from stepladder.errors import InputError
from stepladder.mcq.labels import Evidence, Votes, weigh
from stepladder.records import LETTERS
from stepladder.workspace import write_atomic

SHOWN = 10
"""Suspects printed; the file has all."""


def audit(votes: Path, out: Path, console: Console) -> None:
    """Rank the labels of a votes file and write one row per contested label, the most suspect first.

    A line of ``votes`` is ``{"id", "gold", "votes": {model: [letters]}}``; an entry that is no letter is an answer
    nobody could read. A row of ``out`` is ``{"id", "label", "suggested", "score"}``.

    Raises:
        InputError: naming file, line and field.
    """
    said, labels = read_votes(votes)
    found = weigh(said, labels)
    write_atomic(out, (json.dumps(suspect._asdict(), ensure_ascii=False) + "\n" for suspect in found.suspects))
    _show(found, len(labels), out, console)


def read_votes(path: Path) -> tuple[dict[str, Votes], dict[str, str]]:
    """Votes by question and model, and the label of every question."""
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


def _show(found: Evidence, questions: int, out: Path, console: Console) -> None:
    against = [suspect for suspect in found.suspects if suspect.score > 0]
    console.print(
        f"{len(found.accuracy)} models on {questions:,} questions, worth {found.independent:.1f} independent ones; "
        f"they speak against {len(against)} labels.",
        highlight=False,
    )
    if against:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("question", "label", "suggested"):
            table.add_column(name)
        table.add_column("log-odds", justify="right")
        for suspect in against[:SHOWN]:
            table.add_row(suspect.id, suspect.label, suspect.suggested, f"{suspect.score:.2f}")
        console.print(table)
    console.print(f"Wrote {out}: {len(found.suspects)} contested labels", soft_wrap=True, markup=False, highlight=False)
