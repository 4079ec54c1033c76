"""What commands print, and how: everything on the terminal passes a :class:`PlainConsole`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stepladder.text import printable


class PlainConsole(Console):
    """A console that prints texts of strangers (ids, names, what a model wrote) as texts: square brackets are no
    markup, and what a terminal would act upon stands there by its code. Colours are given as styles."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


MAX_WIDTH = 10_000
"""Of a table, in characters."""


def table(texts: Sequence[str], figures: Sequence[str] = ()) -> Table:
    """A table without lines: columns of words on the left, columns of figures on the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        made.add_column(name, overflow="fold")
    for name in figures:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def print_table(console: Console, rows: Table) -> None:
    """Print a table whole: off a terminal (a file, a pipe) at its full width, on one with words wrapped, and where even
    that is too narrow with lines that are too long; cells are never cut."""
    needed = Measurement.get(console, console.options.update_width(MAX_WIDTH), rows)
    width = needed.minimum if console.is_terminal else needed.maximum
    if width > console.width:
        rows.width = width
    console.print(rows, crop=False)


def say(console: Console, line: str) -> None:
    """Print one line as it is, however long, whatever is in it."""
    console.print(printable(line), soft_wrap=True, markup=False, highlight=False)
