"""The process that sends priced requests: ``python -m stepladder.ask.remote.worker PARENT_PID`` (see ``client``).

Reads the job and then its requests, one JSON object a line, from standard input; writes reports to standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import os
import re
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
from stepladder.ask.remote.stopping import GRACE_SECONDS, Stop
from stepladder.ask.remote.tally import Tally
from stepladder.ask.remote.teacher import RemoteModel, priced_model
from stepladder.ask.request import Request
from stepladder.config import Model
from stepladder.errors import AskError, BudgetError, LedgerError

PARENT_POLL_SECONDS = 0.1
"""Between checks whether the parent still runs."""
REPORT_SECONDS = 0.1
"""At least, between two reports of progress."""


def main() -> None:
    """Send the requests. SIGINT: send nothing more, and wait for answers in flight; SIGTERM: no longer than
    GRACE_SECONDS. Either may come again and again, and the end of the parent counts as a SIGINT."""
    cast(io.TextIOWrapper, sys.stdin).reconfigure(encoding="utf-8")  # not the encoding of the locale
    stop = Stop()
    signal.signal(signal.SIGINT, lambda *_: stop.request())
    signal.signal(signal.SIGTERM, lambda *_: stop.request(GRACE_SECONDS))
    threading.Thread(target=_stop_when_orphaned, args=(int(sys.argv[1]), stop), daemon=True).start()
    _report({"ready": True})  # before it, a signal would end this process with a traceback
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("aiohttp")  # while the parent may still be waiting for its servers
    if not (line := sys.stdin.readline()).endswith("\n"):
        return  # the parent ended before it had said what to do
    job = json.loads(line)
    reported_at = 0.0

    def report(finished: int, spent: int) -> None:
        nonlocal reported_at
        if (now_seconds := time.monotonic()) - reported_at >= REPORT_SECONDS:
            reported_at = now_seconds
            _report({"done": finished, "spent": spent})

    try:
        with Ledger(Path(job["ledger"])) as ledger:
            tally = asyncio.run(_ask(job, ledger, report, stop))
    except (AskError, BudgetError, LedgerError) as error:
        _report({"error": type(error).__name__, "message": str(error)})
    else:
        _report({"done": tally.stored + tally.answered, "spent": tally.micro_dollars})


async def _ask(job: dict[str, Any], ledger: Ledger, report: SpendReport, stop: Stop) -> Tally:
    control_tokens = re.compile(job["control_tokens"])
    model = RemoteModel(job["name"], Model.model_validate(job["model"]), key=job["key"], control_tokens=control_tokens)
    scope = Scope(**job["scope"])
    admission = Admission(job["identity"], model.served, job["probe"], scope.run) if job["must_show"] else None
    priced = priced_model(model, admission, _note, job["start"])
    return await ask_all(_requests(), priced, ledger, scope, Listener(report, _note), stop)


def _note(line: str) -> None:
    _report({"note": line})


def _requests() -> Iterator[Request]:
    for line in sys.stdin:
        if not line.endswith("\n"):
            return  # the parent ended in the middle of it
        yield Request.model_validate_json(line)


def _stop_when_orphaned(parent: int, stop: Stop) -> None:
    """Stop once the parent has ended."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    stop.request()


def _report(message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent may be gone
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
