"""``stepladder import``: multiple-choice questions of other formats as a question file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from stepladder.mcq.formats import Columns, convert
from stepladder.terminal import say


def import_(source: Path, out: Path, form: str | None, columns: Columns, console: Console) -> None:
    """Write the questions of ``source`` in the contest's format (:func:`stepladder.mcq.formats.convert`)."""
    count = convert(source, out, form, columns)
    say(console, f"Wrote {out}: {count:,} question{'' if count == 1 else 's'}")
