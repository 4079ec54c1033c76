"""``stepladder audit``: rank labels by the evidence against them in recorded votes."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from stepladder.mcq.labels import Evidence, weigh
from stepladder.mcq.votefile import read_votes
from stepladder.terminal import print_table, say, table
from stepladder.workspace import write_atomic

MAX_SUSPECTS_PRINTED = 10
"""The file has all."""


def audit(votes: Path, out: Path, console: Console) -> None:
    """Rank the labels of a votes file and write one row per contested label, the most suspect first.

    A line of ``votes`` is ``{"id", "gold", "votes": {model: [letters]}}``; an entry that is no letter stands for an
    unreadable answer. A row of ``out`` is ``{"id", "label", "suggested", "score"}``.

    Raises:
        InputError: naming file, line and field.
    """
    votes_by_question, labels = read_votes(votes)
    evidence = weigh(votes_by_question, labels)
    write_atomic(out, (json.dumps(suspect._asdict(), ensure_ascii=False) + "\n" for suspect in evidence.suspects))
    _show(evidence, len(labels), out, console)


def _show(evidence: Evidence, questions: int, out: Path, console: Console) -> None:
    against = [suspect for suspect in evidence.suspects if suspect.score > 0]
    console.print(
        f"{len(evidence.accuracy)} models on {questions:,} questions, worth {evidence.independent:.1f} independent "
        f"models; the evidence is against {len(against)} labels.",
        highlight=False,
    )
    if against:
        rows = table(["question", "label", "suggested"], ["log-odds"])
        for suspect in against[:MAX_SUSPECTS_PRINTED]:
            rows.add_row(suspect.id, suspect.label, suspect.suggested, f"{suspect.score:.2f}")
        print_table(console, rows)
    say(console, f"Wrote {out}: {len(evidence.suspects)} contested labels")
