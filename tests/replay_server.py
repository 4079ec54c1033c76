"""The test server with the recorded answers of real models: the whole cascade on real problems, without a GPU.

    python tests/replay_server.py --contest FOLDER --log LOG.jsonl

FOLDER holds the contest's ``train.jsonl`` and ``recorded_responses.jsonl``. A request's last user message says which
question is asked, and only with its options as they are, since that is how the answers were recorded; any other prompt
is a 400. The request's ``seed`` numbers the answer where several were recorded. Where none was, the model never got the
question right, or was not asked, and says so without a letter.

Tokens are counted by the rule of thumb of DeepSeek's API documentation, 0.6 a Chinese character and 0.3 any other, so
every model pays by the same measure; a wide character (Unicode's East Asian Width W or F) counts as Chinese.

The recordings are mostly the final right answers after retries: a model looks better here than it is at its first try.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self
from unicodedata import east_asian_width

from api_provider import Order, Provider, cap_of, last_user, plain
from api_script import Price, Refusal, Script, ScriptError
from api_server import ApiServer, serve

from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.records import Question, parse_lines

QUESTIONS, ANSWERS = "train.jsonl", "recorded_responses.jsonl"
UNRECORDED = "无法确定。"
"""What a model says to a question for which nothing was recorded."""
KEY_ENV = "REPLAY_KEY"
"""The environment variable of the configuration; the server wants ``test-key`` in it."""
CAP = 4096
"""Tokens of an answer at most."""


class Teacher(NamedTuple):
    """A recorded model: its name in the file and dollars per million tokens."""

    recorded: str
    price: Price


# List prices of August 2024. Those of the two models that the ladder leaves out follow models of their size.
TEACHERS = {
    "qwen2-7b": Teacher("Qwen2-7B-Instruct", Price(0.20, 0.20)),
    "qwen2-72b": Teacher("Qwen2-72B-Instruct", Price(0.90, 0.90)),
    "deepseek-coder-v2": Teacher("DeepSeek-Coder-V2-Instruct", Price(0.14, 0.28)),
    "llama-8b": Teacher("Meta-Llama-3.1-8B-Instruct", Price(0.20, 0.20)),
    "llama-70b": Teacher("Meta-Llama-3.1-70B-Instruct", Price(0.90, 0.90)),
    "llama-405b": Teacher("Meta-Llama-3.1-405B-Instruct-FP8", Price(3.00, 3.00)),
}
LADDER: Mapping[str, Sequence[str]] = {
    "easy": ("qwen2-7b",),
    "medium": ("qwen2-72b", "deepseek-coder-v2"),
    "hard": ("llama-405b",),
}
"""The models of each rung."""


def configuration(name: str, url: str, train: Path, ladder: Mapping[str, Sequence[str]]) -> str:
    """The TOML of a run that climbs a ladder of recorded models."""
    quoted = {key: json.dumps(value) for key, value in {"name": name, "url": url, "train": str(train)}.items()}
    parts = [
        f'name = {quoted["name"]}\nlanguage = "zh"\n\n[questions]\ntrain = {quoted["train"]}\nvalidation = 0.01\n',
    ]
    for model in dict.fromkeys(model for models in ladder.values() for model in models):
        recorded, price = TEACHERS[model]
        parts.append(
            f'[models.{model}]\nengine = "openai"\nmodel = "{recorded}"\nbase_url = {quoted["url"]}\n'
            f'api_key_env = "{KEY_ENV}"\nprice = {{ input = {price.input}, output = {price.output} }}\n'
        )
    for rung, models in ladder.items():
        asked = json.dumps(list(models))
        parts.append(f'[[rung]]\nname = "{rung}"\nmodels = {asked}\nshuffle = false\nmax_tokens = {CAP}\n')
    return "\n".join([*parts, '[[member]]\nname = "a"\n'])


def prompt_of(question: Question) -> str:
    """The user message of a question with its options as they are."""
    return ask_messages(question, tuple(range(len(question.options))))[-1].content


def tenths(text: str) -> Iterable[int]:
    """What each character counts, in tenths of a token."""
    return (6 if east_asian_width(character) in "WF" else 3 for character in text)


def tokens(*texts: str) -> int:
    """Tokens of texts that are paid for together, rounded up."""
    return -(-sum(sum(tenths(text)) for text in texts) // 10)


def cut(text: str, cap: int) -> str:
    """As much of a text as fits into so many tokens: all of it, or exactly as many."""
    return text[: bisect_right(list(accumulate(tenths(text))), 10 * cap)]


def completion(
    n: int, model: str, text: str, finish: str, prompt_tokens: int, completion_tokens: int
) -> dict[str, object]:
    """A chat completion, as OpenAI sends it."""
    return {
        "id": f"chatcmpl-{n}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


class Recordings:
    """What the models answered, and the prompts by which the questions are known."""

    def __init__(self, contest: Path) -> None:
        self._ids: dict[str, str] = {}
        for problem in read_problems(contest / QUESTIONS, "zh", labelled=True):
            for question in problem.questions:
                known = self._ids.setdefault(prompt_of(question), question.id)
                if known != question.id:
                    raise ValueError(f"{question.id} has the prompt of {known}, so nobody can tell which is asked")
        rows = (row for _, row in parse_lines(contest / ANSWERS))
        self._answers: dict[tuple[str, str], list[str]] = {(row["model"], row["id"]): row["responses"] for row in rows}

    def question(self, prompt: str) -> str | None:
        """The id of the question that a prompt asks."""
        return self._ids.get(prompt)

    def answer(self, model: str, question: str, seed: int) -> str:
        """What the model said, or that it cannot say."""
        said = self._answers.get((model, question), [UNRECORDED])
        return said[seed % len(said)]


class Replay(Provider):
    """Answers with what was recorded. Of every request that it bills, the books also tell who was asked what."""

    def __init__(self, books: Path, recordings: Recordings) -> None:
        self._recordings = recordings
        self._prices = {
            teacher.recorded: (Decimal(str(teacher.price.input)), Decimal(str(teacher.price.output)))
            for teacher in TEACHERS.values()
        }
        super().__init__(books, Script(models=tuple(self._prices)))

    def use(self, script: Script) -> None:
        if script != Script(models=tuple(self._prices)):
            raise ScriptError("a replay does what was recorded; a script would be skipped silently")
        super().use(script)

    def serve(
        self, n: int, body: dict[str, Any], sha: str, *, key: str | None = None, custom_id: str | None = None
    ) -> Order:
        """Answer and bill. Raises a Refusal that the caller books."""
        model, question = str(body["model"]), self._recordings.question(last_user(body))
        if question is None:
            raise Refusal(400, "No recorded question has this prompt; only options in their own order are known.")
        whole = self._recordings.answer(model, question, body.get("seed") or 0)
        text = cut(whole, cap_of(body))
        finish = "stop" if text == whole else "length"
        prompt, written = tokens(*map(plain, body["messages"])), tokens(text)
        self.prices = self._prices[model]
        self.bill(n, sha, prompt, written, "", key, custom_id)
        told = {"model": model, "question": question, "recorded": whole != UNRECORDED, "finish": finish}
        self._write(json.dumps({"event": "replayed", "n": n} | told) + "\n")
        return Order(n, sha, completion(n, model, text, finish, prompt, written), None)


class Replayed(NamedTuple):
    """A request as the books have it."""

    model: str
    question: str
    recorded: bool
    """Whether there was an answer to replay."""
    finish: str
    prompt_tokens: int
    completion_tokens: int
    micro_dollars: int


class ReplayServer(ApiServer):
    """The server for the length of a ``with``; ``contest`` is the folder with the recordings."""

    def __init__(self, folder: Path, contest: Path) -> None:
        super().__init__(folder)
        self.contest = contest

    @property
    def command(self) -> list[str]:
        """What is started."""
        return [sys.executable, __file__, "--contest", str(self.contest), "--log", str(self.log_path)]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout
        ready = self.process.stdout.readline()
        if not ready:
            self.stop()
            raise RuntimeError("the replay server did not start; its stderr says why")
        self.port = json.loads(ready)["port"]
        return self

    def replayed(self) -> list[Replayed]:
        """All billed requests, in the order in which they came."""
        asked = {entry["n"]: entry for entry in self.log("replayed")}
        return [
            Replayed(
                *(asked[n][field] for field in Replayed._fields[:4]),
                *(entry[field] for field in Replayed._fields[4:]),
            )
            for n, entry in sorted({entry["n"]: entry for entry in self.log("billed")}.items())
        ]

    def counted(self) -> dict[str, Counter[str]]:
        """Requests, tokens and micro-dollars by model."""
        counts: dict[str, Counter[str]] = {}
        for entry in self.replayed():
            added = {field: getattr(entry, field) for field in Replayed._fields[4:]}
            counts.setdefault(entry.model, Counter()).update(requests=1, **added)
        return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--contest", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(serve(0, Replay(options.log, Recordings(options.contest)), while_stdin=True))


if __name__ == "__main__":
    main()
