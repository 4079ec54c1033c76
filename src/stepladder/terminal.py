"""Tables and lines that commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MAX_WIDTH = 10_000
"""Of a table, in characters."""


def table(texts: Sequence[str], figures: Sequence[str] = ()) -> Table:
    """A table without borders: left-aligned columns ``texts``, then right-aligned columns ``figures``."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        result.add_column(name, overflow="fold")
    for name in figures:
        result.add_column(name, justify="right", no_wrap=True)
    return result


def print_table(console: Console, rows: Table) -> None:
    """Print a table whole: off a terminal (a file, a pipe) at its full width, on one with words wrapped, and where even
    that is too narrow with lines that are too long; cells are never cut."""
    needed = Measurement.get(console, console.options.update_width(MAX_WIDTH), rows)
    width = needed.minimum if console.is_terminal else needed.maximum
    if width > console.width:
        rows.width = width
    console.print(rows, crop=False)


def say(console: Console, line: str) -> None:
    """Print a line without wrapping, markup or highlighting."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)
