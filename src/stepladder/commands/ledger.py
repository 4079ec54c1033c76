"""``stepladder ledger``: what a run's model calls cost and how they ended; ``--export`` writes every one as JSONL,
``--backup`` a copy of the ledger, ``--compact`` makes its file smaller."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from stepladder.ask.ledger import Account, Ledger
from stepladder.context import Context
from stepladder.errors import UserError
from stepladder.terminal import print_table, say, table
from stepladder.workspace import write_atomic


def ledger(config: Path, runs: Path, export: Path | None, backup: Path | None, *, compact: bool = False) -> None:
    """Show the accounts of a run. What the ledger says is not changed.

    Args:
        config: the run's TOML file.
        runs: the folder of the ledger.
        export: a file for every request and raw response of all runs.
        backup: a new file for a copy of the ledger, which may be in use.
        compact: compress what older versions wrote, and return free space to the disk.

    Raises:
        UserError: there is no ledger yet, or a file cannot be written.
    """
    context = Context.open(config, runs)
    path = context.workspace.ledger
    if not path.exists():
        raise UserError(f"{path}: there is no ledger yet; '{context.run_command}' starts one")
    if compact:
        before = path.stat().st_size
        with Ledger(path) as opened:
            opened.compact()
        after = path.stat().st_size
        say(context.progress.console, f"Compacted {path}: {before / 2**20:,.1f} MiB before, {after / 2**20:,.1f} now")
    with Ledger(path, read_only=True) as opened:
        show(opened.accounts(context.workspace.name), context.progress.console)
        if export is not None:
            write_atomic(export, (json.dumps(row, ensure_ascii=False) + "\n" for row in opened.export()))
            say(context.progress.console, f"Wrote {export}")
        if backup is not None:
            opened.back_up(backup)
            say(context.progress.console, f"Wrote {backup}: put it in the place of {path} to go on from it")


def show(accounts: list[Account], console: Console) -> None:
    """Print one row per rung and model, the most expensive first, then the sum."""
    if not accounts:
        console.print("No priced model was asked; answers of weights in this process are free.")
        return
    rows = table(["rung", "model", "outcomes"], ["from ledger", "tokens in", "out", "median s", "95 % s", "dollars"])
    for account in accounts:
        rows.add_row(
            account.rung,
            account.model,
            ", ".join(f"{count:,} {outcome}" for outcome, count in account.outcomes.items()),
            f"{account.hits:,}",
            f"{account.prompt_tokens:,}",
            f"{account.completion_tokens:,}",
            _seconds(account.percentile(0.5)),
            _seconds(account.percentile(0.95)),
            f"{account.micro_dollars / 1e6:,.4f}",
        )
    print_table(console, rows)
    console.print(f"\n${sum(account.micro_dollars for account in accounts) / 1e6:,.4f} in all", highlight=False)


def _seconds(duration: float | None) -> str:
    return "" if duration is None else f"{duration:.2f}"
