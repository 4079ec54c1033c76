"""report.html from report.json: one file without scripts that loads nothing."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from stepladder.reporting import figures, words
from stepladder.reporting.content import Report


def render(report: Report) -> str:
    """The page. All values are escaped, since models or strangers may have written texts in ``report``."""
    environment = Environment(
        loader=PackageLoader("stepladder.reporting", ""),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(report=report, words=words, figures=figures)
