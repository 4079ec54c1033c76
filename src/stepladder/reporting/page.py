"""report.html from report.json: one file, no script, nothing loaded from anywhere."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from stepladder.reporting import figures, words
from stepladder.reporting.content import Report


def render(report: Report) -> str:
    """The page. Everything in ``report`` may have been written by a model or a stranger, so all of it is escaped."""
    environment = Environment(
        loader=PackageLoader("stepladder.reporting", ""),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(report=report, words=words, figures=figures)
