"""A provider for the rehearsal of the championship: recorded answers of real models under the limits that OpenAI and
DeepSeek document, also to shuffled options, and new questions for whoever asks for some.

    python tests/contest_provider.py --contest FOLDER --log LOG.jsonl [--today 2024-11-20] [--queue-tokens 90000]

FOLDER holds the contest's ``train.jsonl`` and ``recorded_responses.jsonl``. A request is known by its problem, its
question and its options, in whatever order; the recorded chain comes back with its letters moved along. Who is asked
for a new question gives one that the contest asks about that problem and the prompt does not know. What is not recorded
is answered without a letter.

Kept to: requests and tokens a minute of each model, with the headers and the refusals that say so; the batch queue by
tokens; the first batch expires half done after its 24 hours; models that are gone by the day that it is; models that
think, which want ``max_completion_tokens`` and no temperature unless they are told not to think.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import sys
import time
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from api_provider import Order, Provider, cap_of, last_user, plain
from api_script import Fault, Price, Refusal, Script
from api_server import serve
from replay_server import ANSWERS, QUESTIONS, UNRECORDED, ReplayServer, completion, cut, tokens

from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.records import LETTERS, Question, parse_lines

QUEUE_TOKENS = 90_000
"""Batch queue of gpt-4o on a first-tier account (platform.openai.com/docs/guides/rate-limits, November 2024)."""
OPTION = re.compile(r"^([A-Z])\. (.*)$")
LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
ANSWER = re.compile(r"((?:答案[是为]?|选项|应选|选择)[\s:：*（(【“\"]*+)([A-Z])(?![A-Za-z])")
WANTED = re.compile(r"(?:\A|\n)题目：((?:(?!\n题目：).)*?)\n\n已经问过：\n(.*)", re.DOTALL)
"""The end of the prompt for a new question: the problem, and what it has been asked already."""


class Served(NamedTuple):
    """A model of the provider. Limits a minute are those of a first-tier account, None where none is documented."""

    recorded: str
    """Whose answers it gives."""
    price: Price
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    last_day: date | None = None
    thinks: bool = False


# OpenAI: platform.openai.com/docs/guides/rate-limits (November 2024) and .../deprecations (October 2026). DeepSeek
# names no limit (api-docs.deepseek.com/quick_start/rate_limit). Prices as in the recipes; of the models of today no
# limits are known.
CATALOGUE = {
    "gpt-4o-mini-2024-07-18": Served("Qwen2-72B-Instruct", Price(0.15, 0.60), 500, 200_000, date(2027, 1, 14)),
    "deepseek-chat": Served("DeepSeek-Coder-V2-Instruct", Price(0.14, 0.28), last_day=date(2026, 7, 24)),
    "gpt-4o-2024-08-06": Served("Meta-Llama-3.1-405B-Instruct-FP8", Price(2.50, 10.00), 500, 30_000, date(2027, 1, 14)),
    "gpt-6-luna": Served("Qwen2-72B-Instruct", Price(0.10, 0.50), thinks=True),
    "deepseek-flash": Served("DeepSeek-Coder-V2-Instruct", Price(0.30, 1.20)),
    "gpt-6.1-terra": Served("Meta-Llama-3.1-405B-Instruct-FP8", Price(1.00, 5.00), thinks=True),
}


def key_of(prompt: str) -> tuple[str, ...]:
    """What a prompt asks, whatever the order of its options."""
    return tuple(sorted(OPTION.sub(r"\2", line) for line in prompt.splitlines()))


class Contest:
    """The contest's questions and what was recorded of each."""

    def __init__(self, folder: Path) -> None:
        self._questions: dict[tuple[str, ...], Question] = {}
        self._by_problem: dict[str, list[Question]] = {}
        for problem in read_problems(folder / QUESTIONS, "zh", labelled=True):
            for question in problem.questions:
                asked = ask_messages(question, tuple(range(len(question.options))))[-1].content
                self._questions.setdefault(key_of(asked), question)
                self._by_problem.setdefault(question.problem.strip(), []).append(question)
        rows = (row for _, row in parse_lines(folder / ANSWERS))
        self._answers: dict[tuple[str, str], list[str]] = {(row["model"], row["id"]): row["responses"] for row in rows}

    def reply(self, model: str, prompt: str, seed: int) -> str:
        """What a recorded model says to a prompt; raises a Refusal where the contest has no such prompt."""
        if wanted := WANTED.search(prompt):
            return self._write(model, wanted[1].strip(), wanted[2], seed)
        question = self._questions.get(key_of(prompt))
        if question is None:
            raise Refusal(400, "No question of the contest has this prompt.")
        return moved(self._answer(model, question, seed), question, prompt)

    def _answer(self, model: str, question: Question, seed: int) -> str:
        recorded = self._answers.get((model, question.id), [UNRECORDED])
        return recorded[seed % len(recorded)]

    def _write(self, model: str, problem: str, asked: str, seed: int) -> str:
        """A question about the problem that was not asked, and the model's chain; the strongest model begins with the
        last one, so that two writers write two questions where there are as many."""
        new = [question for question in self._by_problem.get(problem, []) if question.question not in asked]
        for question in reversed(new) if "405B" in model else new:
            if (chain := self._answer(model, question, seed)) != UNRECORDED:
                options = "\n".join(
                    f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)
                )
                return f"问题：{question.question}\n{options}\n推理：{chain}"
        return UNRECORDED


def moved(chain: str, question: Question, prompt: str) -> str:
    """A recorded chain with the letters that the prompt shows its options under. Where a text has letters of its own,
    such as names of people, only those behind "答案" or "选项" are moved."""
    shown = [match for line in prompt.splitlines() if (match := OPTION.match(line))][-len(question.options) :]
    left, letters = [(match[1], match[2]) for match in shown], {}
    for letter, option in zip(LETTERS, question.options, strict=False):
        place = next(place for place, (_, text) in enumerate(left) if text == option.splitlines()[0])
        letters[letter] = left.pop(place)[0]
    if LETTER.search("\n".join((question.problem, question.question, *question.options))):
        return ANSWER.sub(lambda match: match[1] + letters.get(match[2], match[2]), chain)
    return LETTER.sub(lambda match: letters.get(match[0], match[0]), chain)


class Bucket:
    """So many a minute, filled evenly; full at the start."""

    def __init__(self, unit: str, size: int) -> None:
        self.unit, self.size, self.left, self._filled = unit, size, float(size), time.monotonic()

    def fill(self) -> None:
        now = time.monotonic()
        self.left = min(self.size, self.left + (now - self._filled) * self.size / 60)
        self._filled = now

    def wait_seconds(self, amount: int) -> float:
        """Until so much is there."""
        return max(0.0, (min(amount, self.size) - self.left) * 60 / self.size)

    def headers(self) -> dict[str, str]:
        return {
            f"x-ratelimit-limit-{self.unit}": str(self.size),
            f"x-ratelimit-remaining-{self.unit}": str(max(0, int(self.left))),
            f"x-ratelimit-reset-{self.unit}": f"{math.ceil((self.size - self.left) * 60_000 / self.size)}ms",
        }


class ContestProvider(Provider):
    """Answers for the models that there are on a day, within their limits."""

    def __init__(self, books: Path, contest: Contest, today: date, queue_tokens: int) -> None:
        self._contest = contest
        there = {name: model for name, model in CATALOGUE.items() if model.last_day is None or today < model.last_day}
        limits = {"requests": "requests_per_minute", "tokens": "tokens_per_minute"}
        self._buckets = {
            name: [Bucket(unit, size) for unit, field in limits.items() if (size := getattr(model, field))]
            for name, model in there.items()
        }
        expires = Fault(kind="batch_expired", times=1, done=0.5)
        super().__init__(books, Script(models=tuple(there), faults=(expires,), batch_queue_tokens=queue_tokens))

    def check(self, body: object) -> dict[str, Any]:
        checked = super().check(body)
        thinks = CATALOGUE[checked["model"]].thinks
        if thinks and checked.get("max_tokens") is not None:
            wanted = (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            )
            raise Refusal(400, wanted, "unsupported_parameter")
        if thinks and checked.get("temperature") not in (None, 1) and checked.get("reasoning_effort") != "none":
            raise Refusal(400, "Unsupported value: 'temperature' must be 1 with this model.", "unsupported_value")
        return checked

    def limit(self, body: Mapping[str, Any]) -> dict[str, str]:
        buckets = self._buckets[body["model"]]
        amounts = {"requests": 1, "tokens": self.prompt_tokens(body) + cap_of(body)}
        headers: dict[str, str] = {}
        for bucket in buckets:
            bucket.fill()
            headers |= bucket.headers()
        for bucket in buckets:
            if wait := bucket.wait_seconds(amounts[bucket.unit]):
                said = f"Rate limit reached for {body['model']} on {bucket.unit} per min: Limit {bucket.size}."
                raise Refusal(429, said, None, headers | {"Retry-After": f"{math.ceil(wait)}"}, "rate_limit")
        for bucket in buckets:
            bucket.left -= amounts[bucket.unit]
            headers |= bucket.headers()
        return headers

    def prompt_tokens(self, body: Mapping[str, Any]) -> int:
        return tokens(*map(plain, body["messages"]))

    def serve(
        self, n: int, body: dict[str, Any], sha: str, *, key: str | None = None, custom_id: str | None = None
    ) -> Order:
        name = body["model"]
        model = CATALOGUE[name]
        whole = self._contest.reply(model.recorded, last_user(body), body.get("seed") or 0)
        text = cut(whole, cap_of(body))
        prompt_tokens, completion_tokens = self.prompt_tokens(body), tokens(text)
        self.prices = Decimal(str(model.price.input)), Decimal(str(model.price.output))
        self.bill(n, sha, prompt_tokens, completion_tokens, "", key, custom_id)
        finish = "stop" if text == whole else "length"
        return Order(n, sha, completion(n, name, text, finish, prompt_tokens, completion_tokens), None)


class ContestServer(ReplayServer):
    """The provider for the length of a ``with``; ``today`` is the day that it believes it to be."""

    def __init__(
        self, folder: Path, contest: Path, today: date, queue_tokens: int = QUEUE_TOKENS, fixed_port: int = 0
    ) -> None:
        super().__init__(folder, contest)
        self.today, self.queue_tokens, self.fixed_port = today, queue_tokens, fixed_port

    @property
    def command(self) -> list[str]:
        arguments = ["--contest", str(self.contest), "--log", str(self.log_path), "--today", self.today.isoformat()]
        arguments += ["--port", str(self.fixed_port)]
        return [sys.executable, __file__, *arguments, "--queue-tokens", str(self.queue_tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--contest", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--today", type=date.fromisoformat, required=True)
    parser.add_argument("--queue-tokens", type=int, default=QUEUE_TOKENS)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    provider = ContestProvider(options.log, Contest(options.contest), options.today, options.queue_tokens)
    asyncio.run(serve(options.port, provider, while_stdin=True))


if __name__ == "__main__":
    main()
