"""``stepladder plan``: the pilot if one is wanted, the forecast as a table, and how it turned out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from stepladder import records
from stepladder.ask.ledger import Account, Ledger
from stepladder.config import Config
from stepladder.mcq.shuffle import rng
from stepladder.planning import NONE, ONE, SAMPLED, Asked, Guess, Rates, Row, actual, assume, forecast, share
from stepladder.progress import duration
from stepladder.records import Question
from stepladder.stages import flow
from stepladder.stages.cascade import Cascade, Usage
from stepladder.stages.flow import Context


def plan(context: Context, pilot: int) -> None:
    """Show what the cascade will ask, take and cost. ``pilot`` questions are really asked first, if it is not 0; they
    stand in the ledger then and are not paid for again.

    Raises:
        UserError, AskError, BudgetError: as the stages ``questions`` and ``samples`` do.
    """
    flow.run(context, ("questions",))
    questions = records.read(context.input("questions") / "train.jsonl", Question)
    rates = assume(context.config, questions)
    if pilot:
        drawn = rng("pilot", context.config.seed).sample(questions, min(pilot, len(questions)))
        with context.progress.stage("pilot"):
            rates |= measure(context, sorted(drawn, key=lambda question: question.id), rates)
    problems = len({question.problem_id for question in questions})
    rows = forecast(context.config, len(questions), problems, rates)
    console = context.progress.console
    console.print(f"\n{len(questions):,} training questions about {problems:,} problems\n", highlight=False)
    _show(rows, context.config, console)
    _sources(rates, console)
    if flow.stage("samples").artifact(context, None).state() == "done":
        _compare(rows, _accounts(context), console)


def measure(context: Context, drawn: Sequence[Question], assumed: Mapping[str, Rates]) -> dict[str, Rates]:
    """Rates by rung from asking some questions; a rung that none of them reached keeps what was assumed."""
    steps = [step for step in Cascade(context).climb(drawn) if step.asked and step.rung.kind == "ask"]
    medians = {(a.rung, a.model): statistics.median(a.seconds) for a in _accounts(context) if a.seconds}
    return {
        step.rung.name: Rates(
            share(len(step.solved), step.asked),
            {
                model: _asked(
                    usage, step.asked, assumed[step.rung.name].models[model], medians.get((step.rung.name, model))
                )
                for model, usage in step.usage.items()
            },
            f"pilot of {step.asked}",
        )
        for step in steps
    }


def _asked(usage: Usage, questions: int, assumed: Asked, median: float | None) -> Asked:
    """What a pilot says of one model. Weights in this process keep no times, so theirs is how long the pilot took."""
    calls = ONE.times(usage.calls / questions)
    if not usage.calls:
        return assumed
    seconds = median if median is not None else usage.seconds / usage.calls
    return Asked(
        calls,
        ONE.times(usage.prompt_tokens / usage.calls),
        SAMPLED.times(usage.completion_tokens / usage.calls),
        SAMPLED.times(seconds),
    )


def _accounts(context: Context) -> list[Account]:
    if not context.workspace.ledger.exists():
        return []
    with Ledger(context.workspace.ledger) as ledger:
        return ledger.accounts(context.workspace.name)


def _show(rows: Sequence[Row], config: Config, console: Console) -> None:
    table = _table(("rung", "model"), ("calls", "tokens", "dollars", "low to high", "batched", "time"))
    for row in rows:
        table.add_row(row.rung, row.model, *_cells([row]))
    table.add_section()
    table.add_row("all", "", *_cells(rows), style="bold")
    console.print(table)
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


def _sources(rates: Mapping[str, Rates], console: Console) -> None:
    """Where the figures come from, a line a rung."""
    console.print("\n[bold]What this rests on[/bold]")
    for name, known in rates.items():
        line = f"  {name}: solves {_percent(known.solved)} of what reaches it ({known.source})"
        for model, asked in known.models.items():
            line += f"; {model} {asked.prompt.likely:,.0f} tokens in and {asked.answer.likely:,.0f} out a call"
            line += f", {asked.seconds.likely:.1f} s"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _compare(rows: Sequence[Row], accounts: Sequence[Account], console: Console) -> None:
    """Plan against actual, by rung, the pilot's calls included."""
    spent = actual(accounts)
    table = _table(("rung",), ("calls", "tokens", "dollars", "low to high", "calls made", "tokens", "spent"))
    table.title, table.title_justify = "\nPlan against actual", "left"
    for rung in dict.fromkeys(row.rung for row in rows):
        mine = [row for row in rows if row.rung == rung]
        done = spent.get(rung)
        made = ("", "", "") if done is None else (f"{done.calls:,}", _count(done.tokens), f"{done.dollars:,.4f}")
        table.add_row(rung, *_cells(mine)[:4], *made)
    console.print(table)


def _table(texts: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        table.add_column(name)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
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


def _sum(rows: Sequence[Row], field: str) -> Guess:
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
