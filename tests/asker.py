"""A process that asks: tests and benchmarks start it, kill it, or start two of it on one ledger."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai  # noqa: F401 (imported before the clock starts)

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote import batch_calls
from stepladder.ask.remote.engine import ask_all
from stepladder.ask.remote.teacher import priced_model
from stepladder.ask.request import Request
from stepladder.config import Model, Price
from stepladder.errors import AskError, BudgetError
from stepladder.records import Message

WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
PRICE = Price.model_validate({"input": 1, "output": 2})
FAULTS = [
    {"kind": "500", "share": 0.02},
    {"kind": "disconnect_before", "share": 0.01},
    {"kind": "disconnect_after", "share": 0.02},
    {"kind": "truncated_body", "share": 0.01},
    {"kind": "malformed", "share": 0.01},
]


def start(*arguments: object, script: Path = Path(__file__), python: str = sys.executable) -> subprocess.Popen[str]:
    """Start this file, or another that prints its figures, in a process of its own."""
    command = [python, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The figures it printed last."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def answers(ledger: Ledger) -> int:
    """Attempts that brought an answer home."""
    return sum(account.outcomes.get("answered", 0) for account in ledger.accounts("run"))


def rows(ledger: Ledger, query: str) -> list[tuple[Any, ...]]:
    """What the ledger's file says, read past the ledger."""
    with sqlite3.connect(ledger.path) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def sums_agree(ledger: Ledger) -> bool:
    """Whether what the ledger counts as it writes is what it holds."""
    kept = (
        "SELECT * FROM totals WHERE attempts ORDER BY run, rung, model, outcome",
        "SELECT run, SUM(attempts) FROM durations GROUP BY 1",
        "SELECT * FROM answers ORDER BY run",
    )
    counted = (
        "SELECT run, rung, model, COALESCE(outcome, ''), COUNT(*), SUM(COALESCE(charged, reserved)),"
        " SUM(prompt_tokens), SUM(completion_tokens) FROM attempts GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4",
        "SELECT run, COUNT(*) FROM attempts WHERE seconds IS NOT NULL GROUP BY 1",
        "SELECT run, COUNT(*) FROM responses GROUP BY 1 ORDER BY 1",
    )
    return [rows(ledger, query) for query in kept] == [rows(ledger, query) for query in counted]


def outcomes(ledger: Ledger) -> dict[str, int]:
    """How many attempts came to what."""
    return dict(rows(ledger, "SELECT outcome, COUNT(*) FROM attempts GROUP BY outcome"))


def request(text: str, max_tokens: int = 64) -> Request:
    return Request(model="api test-model", messages=(Message(role="user", content=text),), max_tokens=max_tokens)


def requests(what: str, count: int, max_tokens: int = 16) -> list[Request]:
    return [request(f"{what} {number}", max_tokens) for number in range(count)]


class Numbered(Sequence[Request]):
    """Requests that differ in a number, made as they are read."""

    def __init__(self, count: int, words: int, max_tokens: int) -> None:
        self.numbers, self.words, self.max_tokens = range(count), ["word"] * (words - 2), max_tokens

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return request(" ".join(["question", str(self.numbers[index]), *self.words]), self.max_tokens)


def model(urls: str, concurrency: int) -> Model:
    """The test server, or several separated by commas, as a table of the configuration says it."""
    os.environ["ASKER_KEY"] = "test-key"
    table = {
        "engine": "openai",
        "base_url": urls.split(","),
        "api_key_env": "ASKER_KEY",
        "price": {"input": 1, "output": 2},
    }
    return Model.model_validate({**table, "concurrency": concurrency, "timeout": 5})


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    parser = argparse.ArgumentParser()
    parser.add_argument("url", help="or several, separated by commas")
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--cap", type=int, help="micro-dollars")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--in-process", action="store_true", help="without a worker, requests made as they are sent")
    parser.add_argument("--batch", action="store_true", help="in batches, which are polled twenty times a second")
    parser.add_argument("--words", type=int, default=2, help="of a prompt")
    asked = parser.parse_args()

    if asked.batch:
        batch_calls.PAUSES_SECONDS, batch_calls.LISTING_WAIT_SECONDS = (0.05,) * 7, 0.05  # type: ignore[assignment]
    wanted = Numbered(asked.count, asked.words, asked.max_tokens)
    begun, cpu = time.perf_counter(), time.process_time()
    said = ""
    with Ledger(asked.ledger) as ledger:
        served = RemoteModel("test-model", model(asked.url, asked.concurrency), batch=asked.batch)
        scope = Scope("run", run_cap=asked.cap)
        try:
            if asked.in_process:
                asyncio.run(ask_all(wanted, priced_model(served), ledger, scope))
            else:
                ask_remote(list(wanted), served, ledger, scope, Listener(note=lambda line: print(line, flush=True)))
        except (AskError, BudgetError) as error:
            said = f"{type(error).__name__}: {error}"
        figures = {
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - cpu + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime,
            "peak_mib": max(resource.getrusage(who).ru_maxrss for who in WHO) / 1024,
            "answered": ledger.calls("run"),
            "spent": ledger.spent("run"),
            "said": said,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
