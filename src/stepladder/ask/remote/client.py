"""Priced requests, sent from a process of its own (``worker``), so that what is in flight survives the run.

An answer that has arrived while the run is being killed is lost with the run's memory, and it is paid for. The worker
outlives the run: when its parent is gone, or interrupts it, it sends nothing more, waits for what is in flight, commits
it and ends. A run that is started meanwhile finds those requests busy and waits for them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from stepladder import models
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import PROBE
from stepladder.ask.remote.batch import ask_in_batches, collect
from stepladder.ask.remote.gate import START
from stepladder.ask.remote.listener import NOBODY, Listener
from stepladder.ask.remote.teacher import RemoteModel, api_key
from stepladder.ask.request import Request, Response
from stepladder.errors import AskError, BudgetError
from stepladder.models import template

ERRORS = {error.__name__: error for error in (AskError, BudgetError)}
WATCH = 0.1
"""Seconds between looks at whether to stop."""
GRACE = 5.0
"""Seconds that a worker has for what is in flight when it must stop; only servers that cost nothing are asked so."""


def ask_remote(
    requests: Sequence[Request],
    model: RemoteModel,
    ledger: Ledger,
    scope: Scope,
    listener: Listener = NOBODY,
    stop: threading.Event | None = None,
) -> dict[str, Response]:
    """Answer every request and return the responses by request key, truncated and refused ones too.

    Args:
        requests: what is asked; what the ledger knows is not asked again.
        model: who is asked, and how.
        ledger: what keeps the answers.
        scope: on whose account.
        listener: receives progress, spend and notes.
        stop: once it is set, nothing more is sent.

    Raises:
        BudgetError: the cap is reached; what was answered is kept, and a higher cap goes on from there.
        AskError: the key or the model is wrong, some requests got no answer, or ``stop`` was set.
    """
    known = ledger.find_all(requests)
    missing = [r for r in requests if r.key not in known or not known[r.key].settles(r)]
    here = len(requests) - len(missing)
    if here:
        with ledger.transaction():
            ledger.add_hits(scope, model.name, here)
    listener.report(here, 0)
    if not missing:
        return known
    settings, key = model.settings, api_key(model)  # before anything starts
    counting = Listener(lambda done, spent: listener.report(here + done, spent), listener.note)
    if model.batch:
        ask_in_batches(missing, model, key, ledger, scope, counting)
        return ledger.find_all(requests)
    if len(settings.base_url) == 1:
        collect(model, key, ledger, counting)
    job = {
        "name": model.name,
        "model": settings.model_dump(mode="json", exclude_unset=True),
        "identity": missing[0].model,
        "probe": _probe_tokens(settings.path) if settings.is_own and settings.path else None,
        "ledger": str(ledger.path),
        "scope": scope._asdict(),
        "start": settings.concurrency if model.dedicated else START,
    }
    _send(missing, job, counting, stop)
    return ledger.find_all(requests)


def _send(requests: list[Request], job: dict[str, Any], listener: Listener, stop: threading.Event | None) -> None:
    """Start a worker, hand it the requests, pass on what it reports."""
    process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
        [sys.executable, "-m", "stepladder.ask.remote.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # out of reach of the terminal's Ctrl-C, which its parent passes on
    )
    assert process.stdin is not None  # noqa: S101 (both are pipes)
    assert process.stdout is not None  # noqa: S101
    feeder = threading.Thread(target=_feed, args=(process.stdin, job, requests), daemon=True)
    feeder.start()
    if stop is not None:
        threading.Thread(target=_interrupt, args=(process, stop), daemon=True).start()
    failure: dict[str, str] = {}
    with process.stdout as lines:
        try:
            for line in lines:
                message = json.loads(line)
                if "error" in message:
                    failure = message
                elif "note" in message:
                    listener.note(message["note"])
                else:
                    listener.report(message["done"], message["spent"])
            process.wait()
        except BaseException:  # an interrupt, or a limit on time
            if stop is None or not stop.is_set():  # else it has been interrupted, and a second time would end it
                process.send_signal(signal.SIGINT)
            process.wait()
            raise
    feeder.join()
    if stop is not None and stop.is_set():
        raise AskError("stopped before everything was answered")
    if failure:
        raise ERRORS[failure["error"]](failure["message"])
    if process.returncode:
        raise RuntimeError(f"the asking process ended with code {process.returncode}")


def _interrupt(process: subprocess.Popen[str], stop: threading.Event) -> None:
    """Interrupt a worker once ``stop`` is set, and do not wait long for what it still has in flight."""
    while process.poll() is None:
        if stop.wait(WATCH):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return


def _feed(pipe: IO[str], job: dict[str, Any], requests: list[Request]) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:  # it may stop before it needs them all
        pipe.write(json.dumps(job) + "\n")
        pipe.writelines(request.model_dump_json() + "\n" for request in requests)


@functools.cache
def _probe_tokens(path: str) -> list[int]:
    """The probe as the weights' own tokenizer renders it."""
    return template.prompt_tokens(models.load_tokenizer(models.locate(path)), PROBE)
