"""Calls, tokens, dollars and time of the cascade, as arithmetic; ``cost_tables`` shows them.

Every figure is an estimate with a low, a likely and a high value. The low one assumes the cheap end of every
uncertain quantity (rungs solve much, answers are short), the high one the expensive end.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from scipy.stats import beta

from stepladder.ask.ledger import Account
from stepladder.config import Config, Model, Price, Rung, Variants
from stepladder.forecast.memory import MAX_SEQUENCES
from stepladder.mcq.chainfile import read_chains
from stepladder.mcq.prompts import ask_messages
from stepladder.records import Question


class Estimate(NamedTuple):
    """A figure in the cheap, the likely and the expensive case."""

    low: float
    likely: float
    high: float

    def times(self, other: Estimate | float) -> Estimate:
        """The product, case by case."""
        factors = other if isinstance(other, Estimate) else Estimate(other, other, other)
        return Estimate(*(value * factor for value, factor in zip(self, factors, strict=True)))

    def plus(self, other: Estimate) -> Estimate:
        """The sum, case by case."""
        return Estimate(*(value + addend for value, addend in zip(self, other, strict=True)))


ZERO = Estimate(0, 0, 0)
ONE = Estimate(1, 1, 1)

SOLVED_SHARES = (Estimate(0.45, 0.35, 0.25), Estimate(0.8, 0.65, 0.5), Estimate(0.7, 0.5, 0.3))
"""Share of the questions reaching a rung that it solves: the first rung, the second, any later one. From the report of
the contest's winning entry: 30 to 40 % of all questions on the first rung, another 40 to 50 % on the second."""
ANSWER_TOKENS = Estimate(200, 400, 800)
"""In a chain."""
TOKENS_PER_CHARACTER = {True: 0.6, False: 0.3}
"""For wide (Chinese) characters and others: the rule of thumb of DeepSeek's API documentation."""
TOKENIZER_FACTOR = Estimate(0.8, 1.0, 1.3)
"""How far tokenizers deviate from that rule."""
PILOT_FACTOR = Estimate(0.85, 1.0, 1.15)
"""How far the mean of a pilot may deviate from that of the run."""
TOKENS_PER_SECOND = Estimate(80, 40, 20)
"""Of one answer at a provider."""
MAX_SAMPLED_PROMPTS = 256
"""Prompts rendered to estimate their mean length."""


class ModelRates(NamedTuple):
    """Rates of one model on one rung."""

    calls: Estimate
    """For each question that reaches the rung."""
    prompt: Estimate
    """Tokens of a call."""
    answer: Estimate
    """Tokens of a call."""
    seconds: Estimate
    """Of a call."""


class Rates(NamedTuple):
    """Rates of one rung."""

    solved: Estimate
    """Share of the questions reaching the rung that it solves; ``low``, the cheap case, is the largest share."""
    models: Mapping[str, ModelRates]
    source: str
    """What they are based on, such as ``assumed``."""


class CostRow(NamedTuple):
    """The forecast of one model on one rung."""

    rung: str
    model: str
    questions: Estimate
    calls: Estimate
    prompt_tokens: Estimate
    completion_tokens: Estimate
    dollars: Estimate
    batched: Estimate | None
    """Dollars through the provider's batch API; None for weights in this process and self-hosted servers."""
    seconds: Estimate
    source: str


def assume(config: Config, questions: Sequence[Question]) -> dict[str, Rates]:
    """Rates by rung without a pilot. The share of a rung that asks no model is counted: questions with a worked
    solution, or with a chain."""
    sampled = questions[:: max(1, len(questions) // MAX_SAMPLED_PROMPTS)]
    folders = {name: config.prompts_for(name) for name in config.models}
    mean_tokens = {
        folder: TOKENIZER_FACTOR.times(fmean(prompt_tokens(question, folder) for question in sampled) if sampled else 0)
        for folder in {*folders.values()}
    }
    rates, position = {}, 0
    for rung in config.rung:
        if rung.kind != "ask":
            chains = read_chains(rung.chains) if rung.chains is not None else {}
            free = [
                question.id in chains or (rung.kind == "worked" and bool(question.worked)) for question in questions
            ]
            share = fmean(free) if free else 0.0
            rates[rung.name] = Rates(ONE.times(share), {}, "counted")
            continue
        solved = SOLVED_SHARES[min(position, len(SOLVED_SHARES) - 1)]
        position += 1
        answer = Estimate(*(min(tokens, rung.max_tokens) for tokens in ANSWER_TOKENS))
        seconds = Estimate(*(tokens / speed for tokens, speed in zip(answer, TOKENS_PER_SECOND, strict=True)))
        calls = _calls_per_question(rung, solved)
        models = {name: ModelRates(calls, mean_tokens[folders[name]], answer, seconds) for name in rung.models}
        rates[rung.name] = Rates(solved, models, "assumed")
    return rates


def prompt_tokens(question: Question, prompts: Path | None) -> float:
    """Tokens of a question's prompt, rendered from a folder of templates, by the rule of thumb."""
    messages = ask_messages(question, tuple(range(len(question.options))), prompts)
    return sum(text_tokens(message.content) for message in messages)


def text_tokens(text: str) -> float:
    """Tokens of a text by the rule of thumb."""
    return sum(TOKENS_PER_CHARACTER[unicodedata.east_asian_width(character) in "WF"] for character in text)


def _calls_per_question(rung: Rung, solved: Estimate) -> Estimate:
    """Calls of each model for each question. Where all answers must be right, the next one is requested only if all
    before it were; where others only follow a miss, one is."""
    if rung.samples_after_miss:
        return Estimate(*(1 + (1 - share) * (rung.answers - 1) for share in solved))
    if rung.accept == "majority" or rung.answers == 1:
        return ONE.times(rung.answers)
    return Estimate(*(sum(share ** (index / rung.answers) for index in range(rung.answers)) for share in solved))


def solved_share(solved: int, questions: int) -> Estimate:
    """A share measured in a pilot, with its 80 % Jeffreys interval; ``low``, the cheap case, is the upper limit."""
    low, high = beta.ppf([0.1, 0.9], solved + 0.5, questions - solved + 0.5)
    return Estimate(float(high), solved / questions, float(low))


def forecast(config: Config, questions: int, problems: int, rates: Mapping[str, Rates]) -> list[CostRow]:
    """The forecast of every model, rung by rung, then for variants."""
    everything = arriving = ONE.times(questions)
    rows = []
    for rung in config.rung:
        rung_rates, asked = rates[rung.name], everything if rung.also_solved else arriving
        rows += [
            _row(rung.name, name, config.models[name], asked, model_rates, rung_rates.source)
            for name, model_rates in rung_rates.models.items()
        ]
        arriving = arriving.times(Estimate(*(1 - solved for solved in rung_rates.solved)))
    if config.variants is not None:
        rows += _variant_rows(config, config.variants, problems, rates)
    return rows


def _row(rung: str, name: str, model: Model, questions: Estimate, rates: ModelRates, source: str) -> CostRow:
    calls = questions.times(rates.calls)
    prompt, completion = calls.times(rates.prompt), calls.times(rates.answer)
    price = model.price
    at_once = model.concurrency * max(1, len(model.base_url)) if model.engine == "openai" else 1
    if model.engine == "vllm":  # one server; more cards are faster
        at_once = MAX_SEQUENCES
    # Fewer calls than may be in flight take as long as one.
    in_turn = Estimate(*(max(count / at_once, min(1.0, count)) for count in calls))
    seconds = in_turn.times(rates.seconds)
    limits = [
        total.times(60 / limit)
        for total, limit in (
            (calls, model.requests_per_minute),
            (prompt.plus(completion), model.tokens_per_minute),
        )
        if limit is not None
    ]
    return CostRow(
        rung,
        name,
        questions,
        calls,
        prompt,
        completion,
        _dollars(price, prompt, completion),
        _dollars(price.in_batch(), prompt, completion) if price is not None and not model.is_own else None,
        Estimate(*(max(case) for case in zip(seconds, *limits, strict=True))),
        source,
    )


def _dollars(price: Price | None, prompt: Estimate, completion: Estimate) -> Estimate:
    if price is None:
        return ZERO
    return prompt.times(float(price.input) / 1e6).plus(completion.times(float(price.output) / 1e6))


def _variant_rows(config: Config, variants: Variants, problems: int, rates: Mapping[str, Rates]) -> list[CostRow]:
    """Writers are asked about every problem, judges about every variant of other writers; all variants are assumed to
    be well-formed. Texts are as long as on the first rung that asks a model; a writer's prompt also has examples."""
    rung_rates = next((candidate for candidate in rates.values() if candidate.models), None)
    if rung_rates is None:
        return []
    judge_rates = next(iter(rung_rates.models.values()))._replace(calls=ONE)
    writer_rates = judge_rates._replace(prompt=judge_rates.prompt.times(1.0 + variants.examples))
    written = ONE.times(problems * variants.per_problem)
    rows = [_row("variants", name, config.models[name], written, writer_rates, "assumed") for name in variants.models]
    for name in variants.judges or tuple(config.models):
        other_writers = len(set(variants.models) - {name})
        rows.append(_row("variants", name, config.models[name], written.times(other_writers), judge_rates, "assumed"))
    return rows


class Actual(NamedTuple):
    """What was asked on one rung, or for ``variants``, by the ledger."""

    calls: int = 0
    tokens: int = 0
    dollars: float = 0.0


def actual(accounts: Sequence[Account]) -> dict[str, Actual]:
    """Sums of the accounts by rung. Requests that the ledger answered are not counted."""
    by_rung: dict[str, Actual] = {}
    for account in accounts:
        total = by_rung.get(account.rung, Actual())
        by_rung[account.rung] = Actual(
            total.calls + sum(account.outcomes.values()),
            total.tokens + account.prompt_tokens + account.completion_tokens,
            total.dollars + account.micro_dollars / 1e6,
        )
    return by_rung
