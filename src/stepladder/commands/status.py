"""``stepladder status``: which artifacts of a run are done, stale or missing, and what the run has spent."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from stepladder.ask.ledger import Ledger
from stepladder.context import Context
from stepladder.stages import flow
from stepladder.terminal import say

MARKS = {"done": ("✓", "green"), "stale": ("~", "yellow"), "missing": ("·", "dim")}


def status(config: Path, runs: Path) -> None:
    """Print the state of each artifact of a run, and the money that is spent or reserved."""
    context = Context.open(config, runs)
    console = context.progress.console
    for place, state in flow.states(context):
        console.print(Text.assemble("  ", MARKS[state], f"  {place.label:<24} {state}"))
    if not context.workspace.ledger.exists():
        return
    name = context.workspace.name
    with Ledger(context.workspace.ledger, read_only=True) as ledger:
        console.print(f"\n{ledger.calls(name)} model calls, ${ledger.spent(name) / 1e6:.2f} spent")
        for batch in ledger.unfinished_batches(name):
            line = f"batch {batch.remote}: " if batch.remote else "batch: "
            line += f"{batch.requests:,} requests at the provider; the next run collects them"
            say(console, f"  ${batch.reserved / 1e6:.4f}  {line}")
        for attempt in ledger.unsettled(name):
            outcome = "in flight" if attempt.alive else "in flight when its process ended, so charged at the worst case"
            say(console, f"  ${attempt.reserved / 1e6:.4f}  {attempt.model}: {outcome}")
