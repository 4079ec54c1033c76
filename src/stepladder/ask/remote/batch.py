"""A provider's batch API: requests at half the price, answered within a day.

A batch is in the ledger before it is sent: with an ``intent``, which is also in its metadata at the provider, and with
an attempt for every line, whose id is the line's custom id. So a run may be stopped or killed at any time: the next one
finds the batch by its remote id or by its intent, and settles every line that was charged.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from stepladder.ask.ledger import Batch, Grant, Ledger, Scope
from stepladder.ask.outcome import Delivery, Unreachable
from stepladder.ask.remote.batch_api import BatchApi, BatchRecord, Gone, Refused
from stepladder.ask.remote.batch_lines import write_line
from stepladder.ask.remote.batch_results import BatchResults
from stepladder.ask.remote.engine import MAX_ATTEMPTS
from stepladder.ask.remote.listener import Listener
from stepladder.ask.remote.openai_http import chat_body
from stepladder.ask.remote.tally import Tally, budget_error, unanswered_error
from stepladder.ask.remote.teacher import RemoteModel
from stepladder.ask.remote.waiting import Wait, WaitNotes
from stepladder.ask.request import Request, with_cap, worst_case
from stepladder.errors import AskError

MAX_LINES, MAX_BYTES = 50_000, 190_000_000
"""Of one input file; providers accept 50,000 requests and 200 MB."""
PAUSES_SECONDS = (1, 2, 4, 8, 15, 30, 60)
"""Between polls of a batch; the last one repeats."""
WINDOW_SECONDS = 86_400.0
"""In which a provider answers a batch."""
LISTING_WAIT_SECONDS = 5.0
"""Before a batch that is in no listing is searched for again: it may only just have been created."""
ENDED_STATUSES = {"completed", "failed", "expired", "cancelled"}
MIN_RESULT_BYTES, MAX_RESULT_BYTES = 1_000_000, 2**30
"""That are read of a result file, which is held in memory, however few and however many answers are in it."""

T = TypeVar("T")


def ask_in_batches(
    requests: Sequence[Request], model: RemoteModel, key: str, ledger: Ledger, scope: Scope, listener: Listener
) -> Tally:
    """Answer every request; the answers are in the ledger. Batches that ended processes left are collected first.

    Raises:
        BudgetError, AskError: see :func:`stepladder.ask.ask_remote`.
    """
    with _BatchClient(model, key, ledger, listener) as client:
        client.collect_orphaned()
        return client.answer(requests, scope)


def collect(model: RemoteModel, key: str, ledger: Ledger, listener: Listener) -> None:
    """Wait for batches that ended processes left at the provider: their requests are paid for, so they are not sent
    again."""
    with _BatchClient(model, key, ledger, listener) as client:
        client.collect_orphaned()


class _BatchClient:
    """Submits and collects the batches of one model. Use as a context manager."""

    def __init__(self, model: RemoteModel, key: str, ledger: Ledger, listener: Listener) -> None:
        assert model.settings.price is not None  # noqa: S101 (the configuration requires one)
        self.model, self.key = model, key
        self.endpoint, self.price = model.settings.base_url[0], model.settings.price.in_batch()
        # Identifies whose batches these are: only the same API key sees them.
        self.account = f"{model.served} {model.settings.api_key_env}"
        self.ledger, self.listener = ledger, listener
        self.tally = Tally()
        self.results = BatchResults(model.name, ledger, self.tally, listener.note)
        self.wait_notes = WaitNotes(listener.note, time.monotonic())

    def __enter__(self) -> _BatchClient:
        return self

    def __exit__(self, *_: object) -> None:
        if "api" in self.__dict__:
            self.api.close()

    @functools.cached_property
    def api(self) -> BatchApi:
        return BatchApi(self.endpoint, self.key, self.model.settings.timeout)

    # Submitting

    def answer(self, requests: Sequence[Request], scope: Scope) -> Tally:
        self.ledger.begin_session()
        tally = self.tally
        tally.stored = len({request.key for request in requests}) - len(self._unanswered(requests))
        pauses = _pauses()
        while unanswered := self._unanswered(requests):
            batches, cap_reached = self._reserve(unanswered, scope)
            for batch in [self._create(batch, content) for batch, content in batches]:
                self._collect(batch)
            if self.results.fatal_message is not None:
                raise AskError(
                    f"model {self.model.name!r}: {self.results.fatal_message}; no further batch is made, and what was "
                    "answered is kept"
                )
            if batches:
                pauses = _pauses()
            elif cap_reached:
                worst = sum(worst_case(request, self.price) for request in unanswered)
                raise budget_error(self.model.name, scope, tally, len(unanswered), worst)
            else:
                self._wait(next(pauses), f"a batch of another process at {self.endpoint}")
        if tally.failed:
            raise unanswered_error(self.model.name, tally.failed)
        return tally

    def _unanswered(self, requests: Sequence[Request]) -> list[Request]:
        """The requests still to be sent, without duplicates; those with a truncated answer with twice their cap."""
        responses = self.ledger.find_all(requests)
        unanswered: dict[str, Request] = {}
        for request in sorted(requests, key=lambda request: request.max_tokens):
            response = responses.get(request.key)
            if request.key in self.results.given_up or (response is not None and response.settles(request)):
                continue
            unanswered[request.key] = request if response is None else with_cap(request, 2 * request.max_tokens)
        return list(unanswered.values())

    def _reserve(self, requests: Iterable[Request], scope: Scope) -> tuple[list[tuple[Batch, bytes]], bool]:
        """Open attempts for as many requests as the caps allow. Returns their batches with the contents of their input
        files, and whether a cap was reached."""
        batches: list[tuple[Batch, bytes]] = []
        remaining = list(reversed(list(requests)))
        cap_reached = False
        while remaining and not cap_reached:
            lines: list[bytes] = []
            size = 0
            with self.ledger.transaction():
                batch = self.ledger.open_batch(scope, self.endpoint, self.account, self.price)
                while remaining and len(lines) < MAX_LINES and size < MAX_BYTES and not cap_reached:
                    request = remaining.pop()
                    grant = self.ledger.reserve(request, self.price, scope, self.model.name, self.endpoint, batch)
                    cap_reached = grant == "over_budget"
                    if isinstance(grant, Grant):
                        settings, control_tokens = self.model.settings, self.model.control_tokens
                        served, cap_name, extra_body = self.model.served, settings.cap_name, settings.extra_body
                        body = chat_body(request, served, cap_name, control_tokens, extra_body)
                        lines.append(write_line(grant.attempt, body))
                        size += len(lines[-1])
                        self.tally.micro_dollars += grant.reserved
                if not lines:
                    self.ledger.end_batch(batch, "empty")
            if lines:
                batches.append((batch, b"".join(lines)))
        return batches, cap_reached

    def _create(self, batch: Batch, content: bytes) -> Batch:
        """Upload the input file and start the batch. Without a reply, the batch may have been started all the same."""
        file: str | None = None
        try:
            file = self._until_reached(lambda: self.api.upload(content))
            for _ in range(MAX_ATTEMPTS):
                try:
                    remote: str | None = self.api.create(file, batch.intent)
                except Unreachable:
                    remote = self._find_remote(batch)
                if remote is not None:
                    return self._record_remote(batch, remote)
        except Refused as error:
            self.results.settle_rest(batch, Delivery(error=str(error), sent=False), "refused")
            self._delete(file)
            raise AskError(f"model {self.model.name!r}: the provider rejects the batch ({error})") from None
        raise AskError(
            f"model {self.model.name!r}: {self.endpoint} did not reply whether it made the batch; run again to find out"
        )

    def _record_remote(self, batch: Batch, remote: str) -> Batch:
        with self.ledger.transaction():
            return self.ledger.name_batch(batch, remote)

    def _find_remote(self, batch: Batch) -> str | None:
        """The remote id of a batch by its intent, or None if the provider has no such batch. All of its list is looked
        through, not only what is as young by this machine's clock: a batch that is not found is made, and paid, again.
        """

        def search() -> str | None:
            return next((record.id for record in self.api.list_batches() if record.intent == batch.intent), None)

        for wait in (0.0, LISTING_WAIT_SECONDS):
            time.sleep(wait)
            if (remote := self._until_reached(search)) is not None:
                return remote
        return None

    # Collecting

    def collect_orphaned(self) -> None:
        """Collect the batches that ended processes left at the provider."""
        with self.ledger.transaction():
            orphaned = self.ledger.adopt_batches(self.endpoint, self.account)
        for batch in orphaned:
            self.listener.note(f"model {self.model.name!r}: a batch of an earlier run is collected first")
            remote = batch.remote or self._find_remote(batch)
            if remote is None:
                self.results.settle_rest(batch, Delivery(error="the batch was never made", sent=False), "never made")
            else:
                self._collect(self._record_remote(batch, remote))

    def _collect(self, batch: Batch) -> None:
        """Wait until a batch has ended and settle its lines."""
        assert batch.remote is not None  # noqa: S101 (its remote id has been recorded)
        pauses = _pauses()
        stray = b""
        try:
            while (record := self._retrieve(batch.remote)).status not in ENDED_STATUSES:
                self._report_progress(record.completed)
                self._wait(next(pauses), f"a batch at {self.endpoint}", batch.created + WINDOW_SECONDS - time.time())
            for file in record.result_files:
                stray += self._settle_file(batch, file)
        except Gone as error:
            self.results.settle_rest(batch, Delivery(error=f"the provider lost the batch ({error})"), "gone", stray)
            return
        # Lines in neither file: a batch that failed validation was not processed; of any other it is unknown.
        if record.status == "failed":
            why = "; ".join(record.reasons) or "it gives no reason"
            self.results.fatal_message = f"the provider refused the batch: {why}"
        missing = f"the batch is {record.status} and its files lack this line"
        self.results.settle_rest(batch, Delivery(error=missing, sent=record.status != "failed"), record.status, stray)
        self._delete(record.input_file)

    def _delete(self, file: str | None) -> None:
        """Delete an input file, which holds the questions. What a result file holds is on the disk by now; the provider
        deletes it after a while, and this file too where it cannot be reached."""
        if file is not None:
            with contextlib.suppress(Unreachable, Refused):
                self.api.delete(file)

    def _retrieve(self, remote: str) -> BatchRecord:
        return self._until_reached(lambda: self.api.retrieve(remote))

    def _settle_file(self, batch: Batch, file: str) -> bytes:
        """Settle the attempts that have a line in a file; returns the lines that belong to no attempt of the batch."""
        attempts = self.ledger.batch_attempts(batch)
        bounds = (attempt[1].reply_bound for attempt in attempts.values() if attempt is not None)
        limit_bytes = min(MAX_RESULT_BYTES, max(MIN_RESULT_BYTES, 2 * sum(bounds)))
        content = self._until_reached(lambda: self.api.content(file, limit_bytes))
        return self.results.settle_lines(batch, content, attempts)

    def _wait(self, seconds: float, what: str, limit_seconds: float | None = None) -> None:
        """Sleep, after saying what for; ``limit_seconds`` is when the wait ends at the latest, where more sleeps may
        follow."""
        now_seconds = time.monotonic()
        until = now_seconds + (seconds if limit_seconds is None else limit_seconds)
        self.wait_notes.look(Wait(what, until, what, is_pause=limit_seconds is None), now_seconds)
        time.sleep(seconds)

    def _until_reached(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns, tried again while the provider is unreachable.

        Raises:
            AskError: it stays unreachable.
        """
        for pause in PAUSES_SECONDS:
            try:
                return call()
            except Unreachable as error:
                reason = str(error)
                self._wait(pause, f"the next try to reach {self.endpoint} ({reason})")
        raise AskError(
            f"model {self.model.name!r}: {self.endpoint} does not answer ({reason}); nothing is lost, run "
            "again to collect what it has done"
        )

    def _report_progress(self, under_way: int = 0) -> None:
        tally = self.tally
        self.listener.report(tally.stored + tally.answered + len(tally.failed) + under_way, tally.micro_dollars)


def _pauses() -> Iterator[float]:
    yield from PAUSES_SECONDS
    while True:
        yield PAUSES_SECONDS[-1]
