"""What the cascade will ask, take and cost, as arithmetic; ``cost_tables`` shows it.

Every figure is a guess at three places: low, likely and high, where low takes all that is uncertain in the cheap
direction at once (rungs solve much, answers are short) and high all in the dear one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from scipy.stats import beta

from stepladder.ask.ledger import Account
from stepladder.config import Config, Model, Price, Rung, Variants
from stepladder.mcq.prompts import ask_messages
from stepladder.records import Question


class Guess(NamedTuple):
    """A figure in the cheap case, the likely one and the dear one."""

    low: float
    likely: float
    high: float

    def times(self, other: Guess | float) -> Guess:
        """The product, case by case."""
        factors = other if isinstance(other, Guess) else Guess(other, other, other)
        return Guess(*(value * factor for value, factor in zip(self, factors, strict=True)))

    def plus(self, other: Guess) -> Guess:
        """The sum, case by case."""
        return Guess(*(value + more for value, more in zip(self, other, strict=True)))


NONE = Guess(0, 0, 0)
ONE = Guess(1, 1, 1)

SOLVED = (Guess(0.45, 0.35, 0.25), Guess(0.8, 0.65, 0.5), Guess(0.7, 0.5, 0.3))
"""Share of the questions that reach a rung which it solves: the first, the second, any later one. As the winning entry
of the contest reports its own: 30 to 40 % at the first, another 40 to 50 % of all at the second."""
ANSWER_TOKENS = Guess(200, 400, 800)
"""Length of a chain of thought, tokens."""
TOKENS = {True: 0.6, False: 0.3}
"""Tokens a character, wide (Chinese) or not: the rule of thumb of DeepSeek's API documentation."""
PROMPTS = Guess(0.8, 1.0, 1.3)
"""How far tokenizers differ from that rule."""
SAMPLED = Guess(0.85, 1.0, 1.15)
"""How far the mean of a pilot may be off."""
TOKENS_PER_SECOND = Guess(80, 40, 20)
"""Of one answer at a provider."""
ANNOUNCED = 256
"""Prompts rendered to learn how long they are."""


class ModelRates(NamedTuple):
    """What one model is asked on one rung, for every question that gets there."""

    calls: Guess
    prompt: Guess
    """Tokens a call."""
    answer: Guess
    """Tokens a call."""
    seconds: Guess
    """Of one call."""


class Rates(NamedTuple):
    """What is known or assumed of one rung."""

    solved: Guess
    """Share of the questions that get there; low is the cheap case, the greatest share."""
    models: Mapping[str, ModelRates]
    source: str
    """Where that comes from."""


class CostRow(NamedTuple):
    """The forecast of one model on one rung."""

    rung: str
    model: str
    questions: Guess
    calls: Guess
    prompt_tokens: Guess
    completion_tokens: Guess
    dollars: Guess
    batched: Guess | None
    """Dollars through the provider's batch API; None where it is the user's own machine."""
    seconds: Guess
    source: str


def assume(config: Config, questions: Sequence[Question]) -> dict[str, Rates]:
    """Rates by rung without a pilot. What a worked rung solves is known: the questions that bring a solution."""
    drawn = questions[:: max(1, len(questions) // ANNOUNCED)]
    prompt = PROMPTS.times(fmean(prompt_tokens(config, question) for question in drawn) if drawn else 0.0)
    rates, position = {}, 0
    for rung in config.rung:
        if rung.kind == "worked":
            share = fmean(question.worked is not None for question in questions) if questions else 0.0
            rates[rung.name] = Rates(ONE.times(share), {}, "counted")
            continue
        solved = SOLVED[min(position, len(SOLVED) - 1)]
        position += 1
        answer = Guess(*(min(tokens, rung.max_tokens) for tokens in ANSWER_TOKENS))
        seconds = Guess(*(tokens / speed for tokens, speed in zip(answer, TOKENS_PER_SECOND, strict=True)))
        rates_of_model = ModelRates(_calls(rung, solved), prompt, answer, seconds)
        rates[rung.name] = Rates(solved, dict.fromkeys(rung.models, rates_of_model), "assumed")
    return rates


def prompt_tokens(config: Config, question: Question) -> float:
    """Tokens of a question's prompt by the rule of thumb."""
    messages = ask_messages(question, tuple(range(len(question.options))), config.prompts)
    return sum(tokens(message.content) for message in messages)


def tokens(text: str) -> float:
    """Tokens of a text by the rule of thumb."""
    return sum(TOKENS[unicodedata.east_asian_width(character) in "WF"] for character in text)


def _calls(rung: Rung, solved: Guess) -> Guess:
    """Calls a question. Where all answers must be right, the next is asked for only while all before were."""
    if rung.accept == "majority" or rung.answers == 1:
        return ONE.times(rung.answers)
    return Guess(*(sum(share ** (index / rung.answers) for index in range(rung.answers)) for share in solved))


def share(solved: int, questions: int) -> Guess:
    """A share seen in a pilot with its 80 % interval (Jeffreys), the greatest first."""
    low, high = beta.ppf([0.1, 0.9], solved + 0.5, questions - solved + 0.5)
    return Guess(float(high), solved / questions, float(low))


def forecast(config: Config, questions: int, problems: int, rates: Mapping[str, Rates]) -> list[CostRow]:
    """What every model will be asked: rung by rung, then for variants."""
    arriving = ONE.times(questions)
    rows = []
    for rung in config.rung:
        known = rates[rung.name]
        rows += [
            _row(rung.name, name, config.models[name], arriving, rates_of_model, known.source)
            for name, rates_of_model in known.models.items()
        ]
        arriving = arriving.times(Guess(*(1 - solved for solved in known.solved)))
    if config.variants is not None:
        rows += _variants(config, config.variants, problems, rates)
    return rows


def _row(rung: str, name: str, model: Model, questions: Guess, rates_of_model: ModelRates, source: str) -> CostRow:
    calls = questions.times(rates_of_model.calls)
    prompt, completion = calls.times(rates_of_model.prompt), calls.times(rates_of_model.answer)
    price = model.price
    at_once = model.concurrency * max(1, len(model.base_url)) if model.engine == "openai" else 1
    # Calls one after the other: fewer than may be in flight take as long as one.
    in_turn = Guess(*(max(count / at_once, min(1.0, count)) for count in calls))
    seconds = in_turn.times(rates_of_model.seconds)
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
        Guess(*(max(case) for case in zip(seconds, *limits, strict=True))),
        source,
    )


def _dollars(price: Price | None, prompt: Guess, completion: Guess) -> Guess:
    if price is None:
        return NONE
    return prompt.times(float(price.input) / 1e6).plus(completion.times(float(price.output) / 1e6))


def _variants(config: Config, wanted: Variants, problems: int, rates: Mapping[str, Rates]) -> list[CostRow]:
    """Writers are asked about every problem, judges about every question that others wrote, all of which are taken to
    be fit to be asked. Texts are as long as on the first rung that asks; a writer reads his examples too."""
    known = next((known_rates for known_rates in rates.values() if known_rates.models), None)
    if known is None:
        return []
    rates_of_model = next(iter(known.models.values()))._replace(calls=ONE)
    longer = rates_of_model._replace(prompt=rates_of_model.prompt.times(1.0 + wanted.examples))
    written = ONE.times(problems * wanted.per_problem)
    rows = [_row("variants", name, config.models[name], written, longer, "assumed") for name in wanted.models]
    for name in wanted.judges or tuple(config.models):
        others = len(set(wanted.models) - {name})
        rows.append(_row("variants", name, config.models[name], written.times(others), rates_of_model, "assumed"))
    return rows


class Actual(NamedTuple):
    """What the ledger says of one rung or of ``variants``."""

    calls: int = 0
    tokens: int = 0
    dollars: float = 0.0


def actual(accounts: Sequence[Account]) -> dict[str, Actual]:
    """By rung, what was sent; answers that stood in the ledger already were not."""
    found: dict[str, Actual] = {}
    for account in accounts:
        before = found.get(account.rung, Actual())
        found[account.rung] = Actual(
            before.calls + sum(account.outcomes.values()),
            before.tokens + account.prompt_tokens + account.completion_tokens,
            before.dollars + account.micro_dollars / 1e6,
        )
    return found
