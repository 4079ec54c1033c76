"""A provider's batch API: requests at half the price, answered within a day.

A batch is in the ledger before it is sent: with an ``intent``, which is also in its metadata at the provider, and with
an attempt for every line, whose id is the line's custom id. So a run may be stopped or killed at any time: the next one
finds the batch by its remote id or by its intent, and settles every line that was charged.

What does not fit into the provider's queue (``batch_queue``) is sent as batches end and make room.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from stepladder.ask.ledger import Batch, Grant, Ledger, Scope
from stepladder.ask.outcome import Delivery
from stepladder.ask.remote.batch_api import BatchRecord, Gone, QueueFull, Refused
from stepladder.ask.remote.batch_calls import BatchCalls, pauses
from stepladder.ask.remote.batch_lines import write_line
from stepladder.ask.remote.batch_queue import Enqueued, Queue, QueueRefusal
from stepladder.ask.remote.batch_results import BatchResults
from stepladder.ask.remote.listener import Listener
from stepladder.ask.remote.openai_http import chat_body
from stepladder.ask.remote.tally import Tally, budget_error, unanswered_error
from stepladder.ask.remote.teacher import RemoteModel
from stepladder.ask.request import Request, with_cap, worst_case
from stepladder.errors import AskError

MAX_LINES, MAX_BYTES = 50_000, 190_000_000
"""Of one input file; providers accept 50,000 requests and 200 MB."""
WINDOW_SECONDS = 86_400.0
"""In which a provider answers a batch."""
ENDED_STATUSES = {"completed", "failed", "expired", "cancelled"}
MIN_RESULT_BYTES, MAX_RESULT_BYTES = 1_000_000, 2**30
"""That are read of a result file, which is held in memory, however few and however many answers are in it."""


def ask_in_batches(
    requests: Sequence[Request], model: RemoteModel, key: str, ledger: Ledger, scope: Scope, listener: Listener
) -> Tally:
    """Answer every request; the answers are in the ledger. Batches that ended processes left are collected first.

    Raises:
        BudgetError, AskError: see :func:`stepladder.ask.ask_remote`.
    """
    with _BatchClient(model, key, ledger, listener) as client:
        client.adopt_orphaned()
        return client.answer(requests, scope)


def collect(model: RemoteModel, key: str, ledger: Ledger, listener: Listener) -> None:
    """Wait for batches that ended processes left at the provider: their requests are paid for, so they are not sent
    again."""
    with _BatchClient(model, key, ledger, listener) as client:
        client.adopt_orphaned()
        client.collect()


class _BatchClient:
    """Submits and collects the batches of one model. Use as a context manager."""

    def __init__(self, model: RemoteModel, key: str, ledger: Ledger, listener: Listener) -> None:
        assert model.settings.price is not None  # noqa: S101 (the configuration requires one)
        self.model, self.price = model, model.settings.price.in_batch()
        self.calls = BatchCalls(model, key, listener.note)
        self.endpoint = self.calls.endpoint
        # Identifies whose batches these are: only the same API key sees them.
        self.account = f"{model.served} {model.settings.api_key_env}"
        self.ledger, self.listener = ledger, listener
        self.tally = Tally()
        self.queue = Queue(model.settings.batch_queue_tokens)
        self.pauses = pauses()  # before the next try when nothing is under way
        self.waited_seconds = 0.0  # for room in the queue, since the last batch that was accepted
        self.results = BatchResults(model.name, ledger, self.tally, listener.note)

    def __enter__(self) -> _BatchClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.close()

    # Submitting

    def answer(self, requests: Sequence[Request], scope: Scope) -> Tally:
        self.ledger.begin_session()
        tally = self.tally
        tally.stored = len({request.key for request in requests} - self.queue.keys) - len(self._unsent(requests))
        while (unsent := self._unsent(requests)) or self.queue.entries:
            result = self._send(unsent, scope)
            if self.queue.entries:
                self._await_change(more=bool({request.key for request in unsent} - self.queue.keys))
            elif self.results.fatal_message is not None:
                raise AskError(
                    f"model {self.model.name!r}: {self.results.fatal_message}; no further batch is made, and what was "
                    "answered is kept"
                )
            elif result == "capped":
                worst = sum(worst_case(request, self.price) for request in unsent)
                raise budget_error(self.model.name, scope, tally, len(unsent), worst)
            elif self.queue.is_full:
                self._wait_for_room()
            elif result == "full":  # a smaller one fits
                continue
            else:
                self.calls.wait(next(self.pauses), f"a batch of another process at {self.endpoint}")
        if tally.failed:
            raise unanswered_error(self.model.name, tally.failed)
        return tally

    def _unsent(self, requests: Sequence[Request]) -> list[Request]:
        """The requests still to be sent, without duplicates; those with a truncated answer with twice their cap."""
        responses = self.ledger.find_all(requests)
        self.queue.measure((request, responses[request.key]) for request in requests if request.key in responses)
        left_alone = self.results.given_up | self.queue.keys
        unsent: dict[str, Request] = {}
        for request in sorted(requests, key=lambda request: request.max_tokens):
            response = responses.get(request.key)
            if request.key in left_alone or (response is not None and response.settles(request)):
                continue
            unsent[request.key] = request if response is None else with_cap(request, 2 * request.max_tokens)
        return list(unsent.values())

    def _send(self, requests: Sequence[Request], scope: Scope) -> Literal["sent", "capped", "full", "busy"]:
        """Send a batch of as many requests as fit into the queue, unless the provider is still looking at the last one;
        or say why not: a cap is reached, the queue is full, or another process has sent them all."""
        if self.results.fatal_message is not None or not requests or not self.queue.has_room(requests[0]):
            return "full"
        entry, content, cap_reached = self._reserve(requests, scope)
        if not entry.keys:
            return "capped" if cap_reached else "busy"
        return "sent" if self._create(entry, content) else "full"

    def _reserve(self, requests: Sequence[Request], scope: Scope) -> tuple[Enqueued, bytes, bool]:
        """Open attempts for as many requests as the caps, the provider's limits on a file and the room in its queue
        allow. Returns their batch, the content of its input file, and whether a cap was reached."""
        lines: list[bytes] = []
        keys: set[str] = set()
        size = bound = 0
        cap_reached = False
        with self.ledger.transaction():
            batch = self.ledger.open_batch(scope, self.endpoint, self.account, self.price)
            for request in requests:
                is_whole = len(lines) >= MAX_LINES or size >= MAX_BYTES
                if cap_reached or is_whole or not self.queue.has_room(request, bound):
                    break
                grant = self.ledger.reserve(request, self.price, scope, self.model.name, self.endpoint, batch)
                cap_reached = grant == "over_budget"
                if isinstance(grant, Grant):
                    settings, control_tokens = self.model.settings, self.model.control_tokens
                    served, cap_name, extra_body = self.model.served, settings.cap_name, settings.extra_body
                    body = chat_body(request, served, cap_name, control_tokens, extra_body)
                    lines.append(write_line(grant.attempt, body))
                    keys.add(request.key)
                    size, bound = size + len(lines[-1]), bound + request.prompt_bound
                    self.tally.micro_dollars += grant.reserved
            if not lines:
                self.ledger.end_batch(batch, "empty")
        return Enqueued(batch, frozenset(keys), bound), b"".join(lines), cap_reached

    def _create(self, entry: Enqueued, content: bytes) -> bool:
        """Upload the input file and start the batch; False if it does not fit into the provider's queue. Without a
        reply, the batch may have been started all the same."""
        batch = entry.batch
        file: str | None = None
        try:
            file = self.calls.upload(content)
            self.queue.enter(entry._replace(batch=self._record_remote(batch, self.calls.create(file, batch))))
        except QueueFull as error:
            self._put_back(entry, error.refusal, file)
            return False
        except Refused as error:
            self.results.settle_rest(batch, Delivery(error=str(error), sent=False), "refused")
            self.calls.delete(file)
            raise AskError(f"model {self.model.name!r}: the provider rejects the batch ({error})") from None
        return True

    def _put_back(self, entry: Enqueued, refusal: QueueRefusal, file: str | None) -> None:
        """Settle a batch that did not fit into the queue: none of its requests was processed."""
        limit_tokens = self.queue.limit_tokens
        self.queue.refuse(entry, refusal)
        if self.queue.limit_tokens != limit_tokens:
            self.listener.note(
                f"model {self.model.name!r}: the provider's batch queue takes {self.queue.limit_tokens:,} tokens at "
                "once; requests are sent as it empties"
            )
        self.results.settle_rest(
            entry.batch, Delivery(error=refusal.message, sent=False), "did not fit into the queue", counts=False
        )
        self.calls.delete(file)

    def _wait_for_room(self) -> None:
        """Wait before the next try to find room in a queue that others fill.

        Raises:
            AskError: there was none for as long as a batch may take.
        """
        pause = next(self.pauses)
        self.waited_seconds += pause
        if self.waited_seconds > WINDOW_SECONDS:
            raise AskError(
                f"model {self.model.name!r}: the provider's batch queue had no room for a day, although no batch of "
                "this run is in it; nothing is lost, run again later, or without 'batch'"
            )
        self.calls.wait(pause, f"room in the batch queue at {self.endpoint}")
        self.queue.is_full = False

    def _record_remote(self, batch: Batch, remote: str) -> Batch:
        with self.ledger.transaction():
            return self.ledger.name_batch(batch, remote)

    # Collecting

    def adopt_orphaned(self) -> None:
        """Take over the batches that ended processes left at the provider."""
        with self.ledger.transaction():
            orphaned = self.ledger.adopt_batches(self.endpoint, self.account)
        for batch in orphaned:
            self.listener.note(f"model {self.model.name!r}: a batch of an earlier run is collected first")
            remote = batch.remote or self.calls.find(batch)
            if remote is None:
                self.results.settle_rest(batch, Delivery(error="the batch was never made", sent=False), "never made")
            else:
                requests = [attempt[1] for attempt in self.ledger.batch_attempts(batch).values() if attempt]
                keys, bound = (request.key for request in requests), sum(request.prompt_bound for request in requests)
                self.queue.enter(Enqueued(self._record_remote(batch, remote), frozenset(keys), bound))

    def collect(self) -> None:
        """Wait until all batches have ended, and settle their lines."""
        while self.queue.entries:
            self._await_change(more=False)

    def _await_change(self, *, more: bool) -> None:
        """Wait until a batch has ended, and settle its lines; where there are ``more`` requests to send, at most until
        the provider has accepted the last batch."""
        poll_pauses = pauses()
        while True:
            completed, has_changed = 0, False
            for entry in self.queue.entries:
                try:
                    record = self.calls.retrieve(str(entry.batch.remote))
                except Gone as error:
                    self._settle(entry, Delivery(error=f"the provider lost the batch ({error})"), "gone")
                    has_changed = True
                    continue
                if record.queue_refusal is None and record.status != "validating" and self.queue.accept(entry):
                    self.pauses, self.waited_seconds = pauses(), 0.0
                    has_changed = has_changed or more
                if record.status in ENDED_STATUSES:
                    self._collect(entry, record)
                    has_changed = True
                else:
                    completed += record.completed
            if has_changed:
                return
            tally = self.tally
            finished = tally.stored + tally.answered + len(tally.failed) + completed
            self.listener.report(finished, tally.micro_dollars)
            created = min(entry.batch.created for entry in self.queue.entries)
            self.calls.wait(next(poll_pauses), f"a batch at {self.endpoint}", created + WINDOW_SECONDS - time.time())

    def _collect(self, entry: Enqueued, record: BatchRecord) -> None:
        """Settle the lines of a batch that has ended."""
        batch, stray = entry.batch, b""
        if record.queue_refusal is not None and not record.result_files:
            self._put_back(entry, record.queue_refusal, record.input_file)
            return
        try:
            for file in record.result_files:
                stray += self._settle_file(batch, file)
        except Gone as error:
            self._settle(entry, Delivery(error=f"the provider lost the batch ({error})"), "gone", stray)
            return
        # Lines in neither file: a batch that failed validation was not processed; of any other it is unknown.
        if record.status == "failed":
            why = "; ".join(record.reasons) or "it gives no reason"
            self.results.fatal_message = f"the provider refused the batch: {why}"
        missing = f"the batch is {record.status} and its files lack this line"
        self._settle(entry, Delivery(error=missing, sent=record.status != "failed"), record.status, stray)
        self.calls.delete(record.input_file)

    def _settle(self, entry: Enqueued, rest: Delivery, status: str, stray: bytes = b"") -> None:
        """Settle what is left of a batch that has ended."""
        self.results.settle_rest(entry.batch, rest, status, stray)
        self.queue.leave(entry)

    def _settle_file(self, batch: Batch, file: str) -> bytes:
        """Settle the attempts that have a line in a file; returns the lines that belong to no attempt of the batch."""
        attempts = self.ledger.batch_attempts(batch)
        bounds = (attempt[1].reply_bound for attempt in attempts.values() if attempt is not None)
        limit_bytes = min(MAX_RESULT_BYTES, max(MIN_RESULT_BYTES, 2 * sum(bounds)))
        content = self.calls.content(file, limit_bytes)
        return self.results.settle_lines(batch, content, attempts)
