"""Drawing of charts as inline SVG, with colours from the page's CSS, for light and dark mode.

So the page stays a few dozen kilobytes and opens offline; an inlined chart library would take megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup


class Scale(NamedTuple):
    """A linear map from data (``low`` to ``high``) to pixels (``start`` to ``end``)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class Drawing:
    """An SVG image. Shapes are drawn in the order they are added, in pixels of the view box; text is escaped."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._shapes: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._add('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', css, x1, y1, x2, y2)

    def rect(self, x: float, y: float, width: float, height: float, css: str, *, tip: str = "") -> None:
        self._add(
            '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="2"><title>{}</title></rect>',
            css, x, y, max(width, 0.0), height, tip,
        )  # fmt: skip

    def dot(self, x: float, y: float, radius: float, css: str, *, tip: str = "") -> None:
        self._add('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>', css, x, y, radius, tip)

    def path(self, points: Iterable[tuple[float, float]], css: str) -> None:
        self._add('<polyline class="{}" points="{}"/>', css, " ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
        self._add('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', css, x, y, anchor, words)

    def markup(self) -> Markup:
        head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _number(self.width), _number(self.height), self.label
        )
        return head + Markup("").join(self._shapes) + Markup("</svg>")

    def _add(self, template: str, *values: str | float) -> None:
        # Markup.format escapes its arguments; only the templates above are inserted as they are.
        arguments = [value if isinstance(value, str) else _number(value) for value in values]
        self._shapes.append(Markup(template).format(*arguments))  # noqa: S704


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
