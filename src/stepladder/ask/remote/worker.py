"""The process that sends priced requests: ``python -m stepladder.ask.remote.worker PARENT`` (see ``client``).

Reads the job and its requests, one JSON line each, from standard input; reports on standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import Admission
from stepladder.ask.remote.engine import ask_all
from stepladder.ask.remote.listener import Listener, SpendReport
from stepladder.ask.remote.tally import Tally
from stepladder.ask.remote.teacher import RemoteModel, priced_model
from stepladder.ask.request import Request
from stepladder.config import Model
from stepladder.errors import AskError, BudgetError

WATCH = 0.1
"""Seconds between looks at whether the parent is still there."""
REPORT = 0.1
"""Seconds between two reports, at least."""


def main() -> None:
    """Send the requests; an interrupt lets what is in flight come home."""
    cast(io.TextIOWrapper, sys.stdin).reconfigure(encoding="utf-8")  # whatever the terminal's is
    with contextlib.suppress(KeyboardInterrupt):  # by then, what was in flight is settled
        _work()


def _work() -> None:
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    job = json.loads(sys.stdin.readline())
    last = 0.0

    def report(done: int, spent: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= REPORT:
            last = now
            _report({"done": done, "spent": spent})

    with Ledger(Path(job["ledger"])) as ledger:
        try:
            tally = asyncio.run(_ask(job, ledger, report))
        except (AskError, BudgetError) as error:
            _report({"error": type(error).__name__, "message": str(error)})
        else:
            _report({"done": tally.stored + tally.answered, "spent": tally.micro_dollars})


async def _ask(job: dict[str, Any], ledger: Ledger, report: SpendReport) -> Tally:
    model, scope = RemoteModel(job["name"], Model.model_validate(job["model"])), Scope(**job["scope"])
    is_own = model.settings.is_own
    admission = Admission(job["identity"], model.served, job["probe"], scope.run) if is_own else None
    asked = priced_model(model, admission, _note, job["start"])
    return await ask_all(_requests(), asked, ledger, scope, Listener(report, _note))


def _note(line: str) -> None:
    _report({"note": line})


def _requests() -> Iterator[Request]:
    for line in sys.stdin:
        yield Request.model_validate_json(line)


def _end_with(parent: int) -> None:
    """Interrupt this process once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os.kill(os.getpid(), signal.SIGINT)


def _report(message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
