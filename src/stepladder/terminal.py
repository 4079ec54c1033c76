"""What commands print alike."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def table(texts: Sequence[str], figures: Sequence[str] = ()) -> Table:
    """A table without lines: columns of words on the left, columns of figures on the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        made.add_column(name)
    for name in figures:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def say(console: Console, line: str) -> None:
    """Print one line as it is, however long, whatever is in it."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)
