"""What a run's model calls cost, as a table for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from stepladder.ask.ledger import Account


def show(accounts: list[Account], console: Console) -> None:
    """One row per rung and model, the dearest first, then the sum."""
    if not accounts:
        console.print("No priced model was asked; answers of weights in this process are free.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rung", "model", "outcomes"):
        table.add_column(name)
    for name in ("from ledger", "tokens in", "out", "median s", "95 % s", "dollars"):
        table.add_column(name, justify="right")
    for account in accounts:
        table.add_row(
            account.rung,
            account.model,
            ", ".join(f"{count:,} {outcome}" for outcome, count in account.outcomes.items()),
            f"{account.hits:,}",
            f"{account.prompt_tokens:,}",
            f"{account.completion_tokens:,}",
            _percentile(account.seconds, 0.5),
            _percentile(account.seconds, 0.95),
            f"{account.micro_dollars / 1e6:,.4f}",
        )
    console.print(table)
    console.print(f"\n${sum(account.micro_dollars for account in accounts) / 1e6:,.4f} in all", highlight=False)


def _percentile(seconds: tuple[float, ...], share: float) -> str:
    """The nearest rank of sorted values."""
    return f"{seconds[min(int(share * len(seconds)), len(seconds) - 1)]:.2f}" if seconds else ""
