"""The process that sends priced requests (``worker``), as its parent starts, feeds and ends it.

What is in flight is paid for, and would be lost with the run's memory. The worker outlives the run: when its parent is
gone, or interrupts it, it sends nothing more, waits for the requests in flight, commits their answers and ends. A run
that is started meanwhile finds those requests busy and waits for them. A second Ctrl-C limits the wait; a third ends
only the run, and leaves the worker to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import IO, Any

from stepladder.ask.remote.listener import Listener
from stepladder.ask.remote.stopping import GRACE_SECONDS
from stepladder.ask.request import Request
from stepladder.errors import AskError, BudgetError, LedgerError

ERRORS = {error.__name__: error for error in (AskError, BudgetError, LedgerError)}
POLL_SECONDS = 0.1
"""Between checks whether the worker has ended."""
KILL_SECONDS = GRACE_SECONDS + 1.0
"""After ``stop`` is set, for a worker to end; then it is killed. Only used with servers that are free."""


class Sender:
    """A worker without work. It may be started ahead: importing what it needs takes a second."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
            [sys.executable, "-m", "stepladder.ask.remote.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl+C at the terminal does not reach it; this process passes it on
        )

    def close(self) -> None:
        """End a worker that got no work."""
        self._process.communicate()

    def send(
        self, job: dict[str, Any], requests: Iterable[Request], listener: Listener, stop: threading.Event | None
    ) -> None:
        """Give the worker its work, and pass its reports on to the listener until it has ended.

        Args:
            job: what ``worker`` reads first.
            requests: read as the worker takes them, in another thread.

        Raises:
            BudgetError, AskError, LedgerError: see :func:`stepladder.ask.ask_remote`.
            AskError: the worker was killed.
            KeyboardInterrupt: after Ctrl-C, once the worker has ended, or at the third.
            RuntimeError: the worker failed.
        """
        process = self._process
        assert process.stdin is not None  # noqa: S101 (both are pipes)
        assert process.stdout is not None  # noqa: S101
        signals = _Signals(process)
        feeder = _Feeder(process.stdin, job, requests)
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
        if feeder.error is not None:
            raise feeder.error
        if signals.interrupts:
            raise KeyboardInterrupt
        if stop is not None and stop.is_set():
            raise AskError("stopped before all requests were answered")
        if failure:
            raise ERRORS[failure["error"]](failure["message"])
        if process.returncode < 0:
            raise AskError(
                f"model {job['name']!r}: the process that sends requests was killed "
                f"({signal.Signals(-process.returncode).name}); what was answered is kept, what was in flight is "
                "charged at the worst case; run again to go on"
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


class _Feeder(threading.Thread):
    """Writes a job and its requests into a pipe."""

    def __init__(self, pipe: IO[str], job: dict[str, Any], requests: Iterable[Request]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._job, self._requests = pipe, job, requests
        self.error: Exception | None = None
        """What the requests raised, if they did."""

    def run(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._pipe as pipe:  # the worker may end before it has read them all
            pipe.write(json.dumps(self._job) + "\n")
            try:
                pipe.writelines(request.model_dump_json() + "\n" for request in self._requests)
            except BrokenPipeError:
                raise
            except Exception as error:  # noqa: BLE001 (the thread that waits raises it)
                self.error = error
