"""Sends priced requests from a process of its own (``worker``), so that answers in flight survive a killed run.

They are paid for, and would be lost with the run's memory. The worker outlives the run: when its parent is gone, or
interrupts it, it sends nothing more, waits for the requests in flight, commits their answers and ends. A run that is
started meanwhile finds those requests busy and waits for them. A second Ctrl-C limits the wait; a third ends only the
run, and leaves the worker to it.
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
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from stepladder import models
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import PROBE
from stepladder.ask.remote.batch import ask_in_batches, collect
from stepladder.ask.remote.gate import PROBES
from stepladder.ask.remote.listener import NO_LISTENER, Listener
from stepladder.ask.remote.stopping import GRACE_SECONDS
from stepladder.ask.remote.teacher import RemoteModel, api_key
from stepladder.ask.request import Request, Response
from stepladder.errors import AskError, BudgetError, LedgerError
from stepladder.models import template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ERRORS = {error.__name__: error for error in (AskError, BudgetError, LedgerError)}
POLL_SECONDS = 0.1
"""Between checks whether the worker has ended."""
KILL_SECONDS = GRACE_SECONDS + 1.0
"""After ``stop`` is set, for a worker to end; then it is killed. Only used with servers that are free."""


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
    tokenizer = _tokenizer(settings.path) if settings.is_own and settings.path else None
    if tokenizer is not None:
        model = model._replace(control_tokens=template.control_tokens(tokenizer))
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
        "probe": None if tokenizer is None else template.prompt_tokens(tokenizer, PROBE),
        "control_tokens": model.control_tokens.pattern,
        "ledger": str(ledger.path),
        "scope": scope._asdict(),
        "start": settings.concurrency if model.dedicated else PROBES,
    }
    _send(missing, job, after_hits, stop)
    return ledger.find_all(requests)


def _send(requests: list[Request], job: dict[str, Any], listener: Listener, stop: threading.Event | None) -> None:
    """Start a worker, send it the requests, and pass its reports on to the listener.

    Raises:
        BudgetError, AskError: see :func:`ask_remote`.
        AskError: the worker was killed.
        KeyboardInterrupt: after Ctrl-C, once the worker has ended, or at the third.
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
    signals = _Signals(process)
    feeder = threading.Thread(target=_feed, args=(process.stdin, job, requests), daemon=True)
    feeder.start()
    if stop is not None:
        threading.Thread(target=_end_on_stop, args=(signals, stop), daemon=True).start()
    failure: dict[str, str] = {}
    with process.stdout as lines, signals.passing_interrupts_on():
        try:
            for line in lines:
                message = json.loads(line)
                if "ready" in message:
                    signals.open()
                elif "error" in message:
                    failure = message
                elif "note" in message:
                    listener.note(message["note"])
                else:
                    listener.report(message["done"], message["spent"])
        except BaseException:  # the time limit of predict, or an error of the listener
            signals.send(signal.SIGINT)
            lines.close()  # a full pipe would hold the worker up
            if not signals.is_left_alone:
                process.wait()
            raise
        process.wait()
    feeder.join()
    if signals.interrupts:
        raise KeyboardInterrupt
    if stop is not None and stop.is_set():
        raise AskError("stopped before all requests were answered")
    if failure:
        raise ERRORS[failure["error"]](failure["message"])
    if process.returncode < 0:
        raise AskError(
            f"model {job['name']!r}: the process that sends requests was killed "
            f"({signal.Signals(-process.returncode).name}); what was answered is kept, what was in flight is charged "
            "at the worst case; run again to go on"
        )
    if process.returncode:
        raise RuntimeError(f"the worker process ended with code {process.returncode}")


class _Signals:
    """Signals to a worker, kept back until it is ready for them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.interrupts = 0
        self._kept_back: list[signal.Signals] = []
        self._is_open = False
        self._lock = threading.RLock()  # a signal handler may find its own thread in here

    @property
    def is_left_alone(self) -> bool:
        """Whether the user has no more patience; the worker keeps what arrives, and ends by itself."""
        return self.interrupts > 2

    def open(self) -> None:
        """Send what has been kept back, and from now on send at once."""
        with self._lock:
            self._is_open = True
            for number in self._kept_back:
                self.process.send_signal(number)
            self._kept_back.clear()

    def send(self, number: signal.Signals) -> None:
        with self._lock:
            if self._is_open:
                self.process.send_signal(number)
            else:
                self._kept_back.append(number)

    @contextlib.contextmanager
    def passing_interrupts_on(self) -> Iterator[None]:
        """Pass Ctrl-C on to the worker instead of raising KeyboardInterrupt: the first as SIGINT, the second as
        SIGTERM; the third raises. Python gives Ctrl-C to the main thread only."""
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, lambda *_: self._interrupt())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self) -> None:
        self.interrupts += 1
        if self.is_left_alone:
            raise KeyboardInterrupt
        self.send(signal.SIGINT if self.interrupts == 1 else signal.SIGTERM)


def _end_on_stop(signals: _Signals, stop: threading.Event) -> None:
    """End a worker soon once ``stop`` is set; kill it if it has not ended after KILL_SECONDS."""
    while signals.process.poll() is None:
        if stop.wait(POLL_SECONDS):
            signals.send(signal.SIGTERM)
            try:
                signals.process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired:
                signals.process.kill()
            return


def _feed(pipe: IO[str], job: dict[str, Any], requests: list[Request]) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:  # the worker may end before it has read all of them
        pipe.write(json.dumps(job) + "\n")
        pipe.writelines(request.model_dump_json() + "\n" for request in requests)


@functools.cache
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(models.locate(path))
