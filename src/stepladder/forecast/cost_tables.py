"""Tables: the forecast of the cascade's cost, and its comparison with what the run cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from stepladder.ask.ledger import Account
from stepladder.config import Config
from stepladder.forecast.cost import ZERO, CostRow, Estimate, Rates, actual
from stepladder.progress import duration
from stepladder.terminal import print_table, table


def show(rows: Sequence[CostRow], config: Config, console: Console) -> None:
    """Print the forecast, and whether the cap on dollars is enough."""
    forecast = table(("rung", "model"), ("calls", "tokens", "dollars", "low to high", "batched", "time"))
    for row in rows:
        forecast.add_row(row.rung, row.model, *_cells([row]))
    forecast.add_section()
    forecast.add_row("all", "", *_cells(rows), style="bold")
    print_table(console, forecast)
    cap, dollars = config.limits.dollars, _sum(rows, "dollars")
    if cap is None:
        console.print("\nThere is no cap; set dollars under [limits].", markup=False)
    else:
        if dollars.high <= cap:
            verdict = "enough in every case"
        elif dollars.likely <= cap:
            verdict = "enough in the likely case, but not in the expensive one"
        else:
            verdict = "not enough"
        console.print(f"\nThe cap of ${cap:,.2f} is {verdict}; no more than that is ever spent.", highlight=False)
    if any(row.batched is not None for row in rows):
        console.print(
            "Batched: dollars through the provider's batch API, which answers within 24 hours (batch = true).",
            style="dim",
        )


def sources(rates: Mapping[str, Rates], console: Console) -> None:
    """Print the rates that the forecast is based on, a line for each rung."""
    console.print("\nBased on", style="bold")
    for name, rung_rates in rates.items():
        line = f"  {name}: solves {_percent(rung_rates.solved)} of what reaches it ({rung_rates.source})"
        for model, model_rates in rung_rates.models.items():
            line += (
                f"; {model} {model_rates.prompt.likely:,.0f} tokens in and {model_rates.answer.likely:,.0f} out a call"
            )
            line += f", {model_rates.seconds.likely:.1f} s"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def compare(rows: Sequence[CostRow], accounts: Sequence[Account], console: Console) -> None:
    """Print the forecast beside what was asked and spent, by rung, the pilot's calls included."""
    actual_by_rung = actual(accounts)
    comparison = table(("rung",), ("calls", "tokens", "dollars", "low to high", "calls made", "tokens", "spent"))
    comparison.title, comparison.title_justify = "\nPlan against actual", "left"
    for rung in dict.fromkeys(row.rung for row in rows):
        forecast_cells = _cells([row for row in rows if row.rung == rung])[:4]
        spent = actual_by_rung.get(rung)
        spent_cells = (
            ("", "", "") if spent is None else (f"{spent.calls:,}", _count(spent.tokens), f"{spent.dollars:,.4f}")
        )
        comparison.add_row(rung, *forecast_cells, *spent_cells)
    print_table(console, comparison)


def _cells(rows: Sequence[CostRow]) -> tuple[str, ...]:
    """Of these rows together: calls, tokens, dollars, their range, dollars in batches, time."""
    dollars, batched = _sum(rows, "dollars"), _sum(rows, "batched")
    return (
        f"{_sum(rows, 'calls').likely:,.0f}",
        _count(_sum(rows, "prompt_tokens").likely + _sum(rows, "completion_tokens").likely),
        f"{dollars.likely:,.2f}",
        f"{dollars.low:,.2f} to {dollars.high:,.2f}",
        "" if all(row.batched is None for row in rows) else f"{batched.likely:,.2f}",
        duration(_sum(rows, "seconds").likely),
    )


def _sum(rows: Sequence[CostRow], field: str) -> Estimate:
    total = ZERO
    for row in rows:
        total = total.plus(getattr(row, field) or ZERO)
    return total


def _percent(estimate: Estimate) -> str:
    low, high = sorted((estimate.low, estimate.high))
    return f"{100 * estimate.likely:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _count(tokens: float) -> str:
    """A number of tokens, rounded: ``9,876``, ``12 k``, ``3.4 M``."""
    if tokens < 10_000:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e3:,.0f} k" if tokens < 1e6 else f"{tokens / 1e6:,.1f} M"
