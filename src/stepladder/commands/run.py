"""``stepladder run``: run every stage that is not up to date and show the result; or run one stage alone."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from stepladder.context import Context
from stepladder.reporting.content import Report
from stepladder.stages import flow
from stepladder.stages.report import HTML, summary
from stepladder.terminal import say


def run(config: Path, runs: Path) -> None:
    """Run every stage that is not up to date, then show the result.

    Raises:
        AskError: an API key that the run needs is not set; nothing has been run.
        ModelError: a finished member is missing or of no use; nothing has been run.
        ServeError: vLLM cannot compute 4-bit weights here; nothing has been run.
        UserError: the group size does not divide the base's widths; nothing has been run.
    """
    context = Context.open(config, runs)
    console = context.progress.console
    console.print(Text.assemble((context.config.name, "bold"), "  ", (str(context.workspace.folder), "dim")))
    with context.workspace.locked():
        flow.check_keys(context)
        flow.check_finished(context)
        flow.check_group_size(context)
        flow.check_kernels(context)
        flow.run(context)
    folder = context.input("report")
    summary(Report.read(folder), console)
    say(console, f"\nReport: {folder / HTML}")


def run_stage(config: Path, runs: Path, name: str) -> None:
    """Run one stage if it is not up to date; those before it must be there and up to date.

    Raises:
        UserError: one before it is not.
    """
    context = Context.open(config, runs)
    with context.workspace.locked():
        flow.check_inputs(context, name)
        flow.run(context, (name,))
