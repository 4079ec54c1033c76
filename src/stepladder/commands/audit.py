"""``stepladder audit``: votes recorded anywhere -> labels ranked by the evidence against them."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from stepladder.mcq.labels import Evidence, weigh
from stepladder.mcq.votefile import read_votes
from stepladder.terminal import say, table
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


def _show(found: Evidence, questions: int, out: Path, console: Console) -> None:
    against = [suspect for suspect in found.suspects if suspect.score > 0]
    console.print(
        f"{len(found.accuracy)} models on {questions:,} questions, worth {found.independent:.1f} independent ones; "
        f"they speak against {len(against)} labels.",
        highlight=False,
    )
    if against:
        shown = table(["question", "label", "suggested"], ["log-odds"])
        for suspect in against[:SHOWN]:
            shown.add_row(suspect.id, suspect.label, suspect.suggested, f"{suspect.score:.2f}")
        console.print(shown)
    say(console, f"Wrote {out}: {len(found.suspects)} contested labels")
