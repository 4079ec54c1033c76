"""``stepladder run``: run every stage that is not up to date and show the result; or run one stage alone."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from stepladder.config import Track
from stepladder.context import Context
from stepladder.reporting import tracking
from stepladder.reporting.content import Report
from stepladder.stages import flow
from stepladder.stages.report import HTML, summary
from stepladder.terminal import say
from stepladder.text import printable

MAX_REASON_CHARACTERS = 300
"""Of what a tracker's library says that went wrong."""


def run(config: Path, runs: Path) -> None:
    """Run every stage that is not up to date, then show the result.

    Raises:
        AskError: an API key that the run needs is not set; nothing has been run.
        ModelError: a finished member is missing or of no use; nothing has been run.
        ServeError: vLLM cannot compute 4-bit weights here; nothing has been run.
        UserError: the group size does not divide the base's widths; nothing has been run.
    """
    context = Context.open(config, runs)
    console, track = context.progress.console, context.config.track
    if track is not None:
        tracking.check(track)
    console.print(Text.assemble((context.config.name, "bold"), "  ", (str(context.workspace.folder), "dim")))
    with context.workspace.locked():
        flow.check_keys(context)
        flow.check_finished(context)
        flow.check_group_size(context)
        flow.check_kernels(context)
        flow.run(context)
    folder = context.input("report")
    report = Report.read(folder)
    summary(report, console)
    say(console, f"\nReport: {folder / HTML}")
    if track is not None:
        pass_on(context, report, track)


def pass_on(context: Context, report: Report, track: Track) -> None:
    """Pass the report on to the tracker; one that does not take it is no reason to fail."""
    console, page = context.progress.console, context.input("report") / HTML
    try:
        if tracking.pass_on(report, page, context.workspace.folder, track):
            say(console, f"Passed on to {track.to}, project {track.project}")
    except Exception as error:  # noqa: BLE001 (whatever the tracker's library raises)
        reason = printable(f"{type(error).__name__}: {error}".splitlines()[0][:MAX_REASON_CHARACTERS])
        say(console, f"{track.to} did not take the report ({reason}); the next 'stepladder run' tries again")


def run_stage(config: Path, runs: Path, name: str) -> None:
    """Run one stage if it is not up to date; those before it must be there and up to date.

    Raises:
        UserError: one before it is not.
    """
    context = Context.open(config, runs)
    with context.workspace.locked():
        flow.check_inputs(context, name)
        flow.run(context, (name,))
