"""Tables and lines that commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def table(texts: Sequence[str], figures: Sequence[str] = ()) -> Table:
    """A table without borders: left-aligned columns ``texts``, then right-aligned columns ``figures``."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        result.add_column(name)
    for name in figures:
        result.add_column(name, justify="right", no_wrap=True)
    return result


def say(console: Console, line: str) -> None:
    """Print a line without wrapping, markup or highlighting."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)
