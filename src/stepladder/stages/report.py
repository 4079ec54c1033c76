"""report: what every step gained, as ``report.json`` for programs and ``report.html`` for people."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepladder.context import Context, Place, artifacts
from stepladder.reporting.content import Report
from stepladder.workspace import Artifact

HTML = "report.html"


def artifact(context: Context, part: str | None) -> Artifact:
    """The report reads every folder made before it.

    Raises:
        UserError: one of them is not there yet.
    """
    inputs = {place.label: place.context.digest_of(place.stage, place.part) for place in _earlier(context)}
    # Nearly every setting appears in some sentence of the page, but no path of this machine.
    settings = context.config.model_dump(mode="json", exclude={"questions", "models", "track"})
    return Artifact(context.input("report"), settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    """Write report.json and report.html; the page is made of the JSON alone.

    Raises:
        UserError: no validation question is labelled.
        InputError: predictions lack a labelled question.
    """
    # Imports SciPy, which takes a second; 'stepladder status' imports this module and should be fast.
    from stepladder.reporting import costs, numbers, page

    folders = [costs.Folder(place.context.label(place.stage), place.part) for place in _earlier(context)]
    report = numbers.collect(context.workspace.folder, context.config, folders)
    report.write(folder)
    (folder / HTML).write_text(page.render(report), encoding="utf-8", newline="\n")


def summary(report: Report, console: Console) -> None:
    """Print the results of a run."""
    from stepladder.reporting import words

    run = report.run
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("system")
    for header in ("right", "accuracy", "95 % interval"):
        table.add_column(header, justify="right")
    for row in report.results:
        if row.split == run.split:
            interval = words.interval(row.low, row.high, 1)
            accuracy = Text(words.percent(row.accuracy, 1), style="bold")
            # Text, not str: a member named "[b]" must not be read as markup.
            table.add_row(Text(words.name(row, run.bits)), f"{row.correct}/{row.n}", accuracy, interval)
    console.print()
    console.print(Text(words.headline(report), style="bold"))
    console.print(Text(words.measured_on(report), style="dim"))
    console.print()
    console.print(table)
    console.print()
    sentences = Table.grid(padding=(0, 2, 0, 0))
    sentences.add_column(style="dim")
    sentences.add_row("cascade", Text(words.cascade(report)))
    sentences.add_row("ensemble", Text(words.ensemble(report)))
    if report.final:
        sentences.add_row("final", Text(words.final(report)))
    if computed := words.number_format(report):
        sentences.add_row("computed", Text(computed))
    sentences.add_row("cost", Text(words.cost(report)))
    console.print(sentences)


def _earlier(context: Context) -> list[Place]:
    """Every artifact made before the report, in flow order."""
    return [place for place in artifacts(context) if place.stage != "report"]
