"""The forecast of the cascade's costs, and how it turned out, as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from stepladder.ask.ledger import Account
from stepladder.config import Config
from stepladder.forecast.cost import NONE, CostRow, Guess, Rates, actual
from stepladder.progress import duration
from stepladder.terminal import table


def show(rows: Sequence[CostRow], config: Config, console: Console) -> None:
    shown = table(("rung", "model"), ("calls", "tokens", "dollars", "low to high", "batched", "time"))
    for row in rows:
        shown.add_row(row.rung, row.model, *_cells([row]))
    shown.add_section()
    shown.add_row("all", "", *_cells(rows), style="bold")
    console.print(shown)
    cap, dollars = config.limits.dollars, _sum(rows, "dollars")
    if cap is None:
        console.print("\nThere is no cap; set dollars under [limits].", markup=False)
    else:
        enough = "enough in every case" if dollars.high <= cap else "enough in the likely case, not in the dear one"
        said = enough if dollars.likely <= cap else "not enough"
        console.print(f"\nThe cap of ${cap:,.2f} is {said}; whatever happens, no more is spent.", highlight=False)
    if any(row.batched is not None for row in rows):
        console.print(
            "Batched: at the price of the provider's batch API, which answers within 24 hours (batch = true).",
            style="dim",
        )


def sources(rates: Mapping[str, Rates], console: Console) -> None:
    """Where the figures come from, a line a rung."""
    console.print("\n[bold]What this rests on[/bold]")
    for name, known in rates.items():
        line = f"  {name}: solves {_percent(known.solved)} of what reaches it ({known.source})"
        for model, each in known.models.items():
            line += f"; {model} {each.prompt.likely:,.0f} tokens in and {each.answer.likely:,.0f} out a call"
            line += f", {each.seconds.likely:.1f} s"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def compare(rows: Sequence[CostRow], accounts: Sequence[Account], console: Console) -> None:
    """Plan against actual, by rung, the pilot's calls included."""
    spent = actual(accounts)
    shown = table(("rung",), ("calls", "tokens", "dollars", "low to high", "calls made", "tokens", "spent"))
    shown.title, shown.title_justify = "\nPlan against actual", "left"
    for rung in dict.fromkeys(row.rung for row in rows):
        mine = [row for row in rows if row.rung == rung]
        done = spent.get(rung)
        made = ("", "", "") if done is None else (f"{done.calls:,}", _count(done.tokens), f"{done.dollars:,.4f}")
        shown.add_row(rung, *_cells(mine)[:4], *made)
    console.print(shown)


def _cells(rows: Sequence[CostRow]) -> tuple[str, ...]:
    """Calls, tokens, dollars, their range, dollars in batches, time: of some rows together."""
    dollars, batched = _sum(rows, "dollars"), _sum(rows, "batched")
    return (
        f"{_sum(rows, 'calls').likely:,.0f}",
        _count(_sum(rows, "prompt_tokens").likely + _sum(rows, "completion_tokens").likely),
        f"{dollars.likely:,.2f}",
        f"{dollars.low:,.2f} to {dollars.high:,.2f}",
        "" if all(row.batched is None for row in rows) else f"{batched.likely:,.2f}",
        duration(_sum(rows, "seconds").likely),
    )


def _sum(rows: Sequence[CostRow], field: str) -> Guess:
    total = NONE
    for row in rows:
        total = total.plus(getattr(row, field) or NONE)
    return total


def _percent(guess: Guess) -> str:
    low, high = sorted((guess.low, guess.high))
    return f"{100 * guess.likely:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _count(tokens: float) -> str:
    """Tokens as a person reads them."""
    if tokens < 10_000:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e3:,.0f} k" if tokens < 1e6 else f"{tokens / 1e6:,.1f} M"
