"""Sends priced requests from a process of its own (``worker``), so that answers in flight survive a killed run.

They are paid for, and would be lost with the run's memory. The worker outlives the run: when its parent is gone, or
interrupts it, it sends nothing more, waits for the requests in flight, commits their answers and ends. A run that is
started meanwhile finds those requests busy and waits for them.
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
from stepladder.ask.remote.gate import START_IN_FLIGHT
from stepladder.ask.remote.listener import NO_LISTENER, Listener
from stepladder.ask.remote.teacher import RemoteModel, api_key
from stepladder.ask.request import Request, Response
from stepladder.errors import AskError, BudgetError, LedgerError
from stepladder.models import template

ERRORS = {error.__name__: error for error in (AskError, BudgetError, LedgerError)}
POLL_SECONDS = 0.1
"""Between checks whether the worker has ended."""
STOP_SECONDS = 5.0
"""For a worker's requests in flight once ``stop`` is set; then it is killed. Only used with servers that are free."""


def ask_remote(
    requests: Sequence[Request],
    model: RemoteModel,
    ledger: Ledger,
    scope: Scope,
    listener: Listener = NO_LISTENER,
    stop: threading.Event | None = None,
) -> dict[str, Response]:
    """Answer every request and return the responses by request key, truncated and refused ones too.

    Args:
        requests: those that the ledger can answer are not sent.
        model: the model, and how to ask it.
        ledger: stores the responses.
        scope: the account, with its caps.
        listener: receives progress, spend and messages.
        stop: once it is set, nothing more is sent.

    Raises:
        BudgetError: a cap is reached; the answers are kept, and with a higher cap the same call asks for the rest.
        AskError: the key or the model is wrong, some requests got no answer, or ``stop`` was set.
        LedgerError: the ledger could not be written for long, or is damaged.
    """
    responses = ledger.find_all(requests)
    missing = [r for r in requests if r.key not in responses or not responses[r.key].settles(r)]
    hits = len(requests) - len(missing)
    if hits:
        with ledger.transaction():
            ledger.add_hits(scope, model.name, hits)
    listener.report(hits, 0)
    if not missing:
        return responses
    settings, key = model.settings, api_key(model)  # raises before anything starts
    after_hits = Listener(lambda finished, spent: listener.report(hits + finished, spent), listener.note)
    if model.batch:
        ask_in_batches(missing, model, key, ledger, scope, after_hits)
        return ledger.find_all(requests)
    if len(settings.base_url) == 1:
        collect(model, key, ledger, after_hits)
    job = {
        "name": model.name,
        "model": settings.model_dump(mode="json", exclude_unset=True),
        "key": model.key,  # by a pipe: nobody else can read it
        "identity": missing[0].model,
        "probe": _probe_tokens(settings.path) if settings.is_own and settings.path else None,
        "ledger": str(ledger.path),
        "scope": scope._asdict(),
        "start": settings.concurrency if model.dedicated else START_IN_FLIGHT,
    }
    _send(missing, job, after_hits, stop)
    return ledger.find_all(requests)


def _send(requests: list[Request], job: dict[str, Any], listener: Listener, stop: threading.Event | None) -> None:
    """Start a worker, send it the requests, and pass its reports on to the listener.

    Raises:
        BudgetError, AskError: see :func:`ask_remote`.
        RuntimeError: the worker failed.
    """
    process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
        [sys.executable, "-m", "stepladder.ask.remote.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl+C at the terminal does not reach it; this process passes it on
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
        except BaseException:  # an interrupt, or the time limit of predict
            if (
                stop is None or not stop.is_set()
            ):  # otherwise it is interrupted already, and a second interrupt would end it
                process.send_signal(signal.SIGINT)
            process.wait()
            raise
    feeder.join()
    if stop is not None and stop.is_set():
        raise AskError("stopped before all requests were answered")
    if failure:
        raise ERRORS[failure["error"]](failure["message"])
    if process.returncode:
        raise RuntimeError(f"the worker process ended with code {process.returncode}")


def _interrupt(process: subprocess.Popen[str], stop: threading.Event) -> None:
    """Interrupt a worker once ``stop`` is set; kill it if it has not ended after STOP_SECONDS."""
    while process.poll() is None:
        if stop.wait(POLL_SECONDS):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            return


def _feed(pipe: IO[str], job: dict[str, Any], requests: list[Request]) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:  # the worker may end before it has read all of them
        pipe.write(json.dumps(job) + "\n")
        pipe.writelines(request.model_dump_json() + "\n" for request in requests)


@functools.cache
def _probe_tokens(path: str) -> list[int]:
    """Token ids of the probe by the tokenizer of these weights."""
    return template.prompt_tokens(models.load_tokenizer(models.locate(path)), PROBE)
