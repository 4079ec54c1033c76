"""A process that asks: tests and benchmarks start it, kill it, or start two of it on one ledger."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import openai  # noqa: F401 (imported before the clock starts)

from stepladder.ask.courier import ask
from stepladder.ask.engine import Endpoint, Teacher, ask_all
from stepladder.ask.gate import Gate
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.openai_http import Http
from stepladder.ask.request import Request
from stepladder.config import Model, Price
from stepladder.errors import AskError, BudgetError
from stepladder.records import Message

WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
PRICE = Price.model_validate({"input": 1, "output": 2})


def request(text: str, max_tokens: int = 64) -> Request:
    return Request(model="api test-model", messages=(Message(role="user", content=text),), max_tokens=max_tokens)


def teacher(url: str, concurrency: int, timeout: float = 5, start: int | None = None) -> Teacher:
    gate = Gate(concurrency)
    gate.limit = float(start or gate.limit)
    return Teacher("test-model", PRICE, [Endpoint(url, lambda: Http(url, "test-model", "test-key", timeout), gate)])


def model(url: str, concurrency: int, timeout: float) -> Model:
    """The same as a table of the configuration would say it."""
    os.environ["ASKER_KEY"] = "test-key"
    table = {"engine": "openai", "base_url": url, "api_key_env": "ASKER_KEY", "price": {"input": 1, "output": 2}}
    return Model.model_validate({**table, "concurrency": concurrency, "timeout": timeout})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--start", type=int, help="requests in flight from the first moment on")
    parser.add_argument("--cap", type=int, help="micro-dollars")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=5)
    parser.add_argument("--run", default="run")
    parser.add_argument("--in-process", action="store_true", help="without a courier, the requests as a stream")
    asked = parser.parse_args()

    def stream() -> Iterator[Request]:
        for number in range(asked.count):
            yield request(f"question {number}", asked.max_tokens)

    begun, cpu = time.perf_counter(), time.process_time()
    said = ""
    with Ledger(asked.ledger) as ledger:
        scope = Scope(asked.run, run_cap=asked.cap)
        try:
            if asked.in_process:
                some = teacher(asked.url, asked.concurrency, asked.timeout, asked.start)
                asyncio.run(ask_all(stream(), some, ledger, scope))
            else:
                ask(list(stream()), "test-model", model(asked.url, asked.concurrency, asked.timeout), ledger, scope)
        except (AskError, BudgetError) as error:
            said = f"{type(error).__name__}: {error}"
        figures = {
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - cpu + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime,
            "peak_mib": max(resource.getrusage(who).ru_maxrss for who in WHO) / 1024,
            "answered": ledger.calls(asked.run),
            "spent": ledger.spent(asked.run),
            "said": said,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
