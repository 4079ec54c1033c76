"""A provider's batch API: requests at half the price, answered within a day, collected whenever a run comes back.

What is going to be sent is in the ledger before it is: the batch with an ``intent`` that its metadata carries, and an
attempt for every line, whose number is the line's custom id. So whatever dies, the next run finds the batch, by its
name or by its intent, and settles every line it was charged for. Nothing waits in memory: a run may be stopped while
the provider works.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from stepladder.ask.ledger import CHUNK, Batch, Grant, Ledger, Scope
from stepladder.ask.outcome import FINAL, Delivery, Outcome, Unreachable, judge
from stepladder.ask.remote.batch_lines import read_line, write_line
from stepladder.ask.remote.engine import TRIES
from stepladder.ask.remote.listener import Listener
from stepladder.ask.remote.openai_http import Files, Gone, Refused, chat_body
from stepladder.ask.remote.tally import Tally, no_answers, over_budget
from stepladder.ask.remote.teacher import RemoteModel
from stepladder.ask.request import Request, with_cap, worst_case
from stepladder.errors import AskError

MOST_LINES, MOST_BYTES = 50_000, 190_000_000
"""Of one input file; providers take 50,000 requests and 200 MB."""
PAUSES = (1, 2, 4, 8, 15, 30, 60)
"""Seconds between looks at a batch; the last for all further ones."""
GRACE = 5.0
"""Seconds before a batch that is in no listing is looked for again: its creation may still have been on the way."""
ENDED = {"completed", "failed", "expired", "cancelled"}
INTENT = "stepladder_intent"
"""The key under which a batch's metadata carries its intent."""

T = TypeVar("T")


def ask_in_batches(
    requests: Sequence[Request], model: RemoteModel, key: str, ledger: Ledger, scope: Scope, listener: Listener
) -> Tally:
    """Answer every request; the answers are in the ledger. Batches of runs that have ended are collected first.

    Raises:
        BudgetError, AskError: see :func:`stepladder.ask.ask_remote`.
    """
    with _Batches(model, key, ledger, listener) as batches:
        batches.collect_old()
        return batches.answer(requests, scope)


def collect(model: RemoteModel, key: str, ledger: Ledger, listener: Listener) -> None:
    """Wait for what is still at the provider from runs that have ended: it is paid for, so it is not asked again."""
    with _Batches(model, key, ledger, listener) as batches:
        batches.collect_old()


class _Batches:
    """Where batches are handed in and collected."""

    def __init__(self, model: RemoteModel, key: str, ledger: Ledger, listener: Listener) -> None:
        assert model.settings.price is not None  # noqa: S101 (the caller has seen to it)
        self.model, self.key = model, key
        self.endpoint, self.price = model.settings.base_url[0], model.settings.price.in_batch()
        # Only who asks for the same model with the same key can see a batch.
        self.account = f"{model.served} {model.settings.api_key_env}"
        self.ledger, self.listener = ledger, listener
        self.tally = Tally()
        self.tries: Counter[str] = Counter()
        self.given_up: set[str] = set()
        self.fatal: str | None = None

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *_: object) -> None:
        if "files" in self.__dict__:
            self.files.close()

    @functools.cached_property
    def files(self) -> Files:
        return Files(self.endpoint, self.key, self.model.settings.timeout)

    # Handing in

    def answer(self, requests: Sequence[Request], scope: Scope) -> Tally:
        self.ledger.begin_session()
        tally = self.tally
        tally.stored = len({request.key for request in requests}) - len(self._wanted(requests))
        pause = _pauses()
        while wanted := self._wanted(requests):
            batches, broke = self._hand_in(wanted, scope)
            for batch in [self._create(batch) for batch in batches]:
                self._collect(batch)
            if self.fatal is not None:
                said = f"model {self.model.name!r}: {self.fatal}"
                raise AskError(f"{said}; no further batch is made, and what was answered is kept")
            if batches:
                pause = _pauses()
            elif broke:
                worst = sum(worst_case(request, self.price) for request in wanted)
                raise over_budget(self.model.name, scope, tally, len(wanted), worst)
            else:  # another process has them in a batch of its own
                time.sleep(next(pause))
        if tally.failed:
            raise no_answers(self.model.name, tally.failed)
        return tally

    def _wanted(self, requests: Sequence[Request]) -> list[Request]:
        """What is still to be asked, each request once, a cut-off answer's with twice its cap."""
        known = self.ledger.find_all(requests)
        wanted: dict[str, Request] = {}
        for request in sorted(requests, key=lambda request: request.max_tokens):
            if request.key in self.given_up or (request.key in known and known[request.key].settles(request)):
                continue
            wanted[request.key] = with_cap(request, 2 * request.max_tokens) if request.key in known else request
        return list(wanted.values())

    def _hand_in(self, wanted: Iterable[Request], scope: Scope) -> tuple[list[tuple[Batch, bytes]], bool]:
        """Reserve for as many as the caps allow and write their batches down; whether a cap was reached."""
        made: list[tuple[Batch, bytes]] = []
        left = list(reversed(list(wanted)))
        broke = False
        while left and not broke:
            lines: list[bytes] = []
            size = 0
            with self.ledger.transaction():
                batch = self.ledger.open_batch(scope, self.endpoint, self.account, self.price)
                while left and len(lines) < MOST_LINES and size < MOST_BYTES and not broke:
                    request = left.pop()
                    grant = self.ledger.reserve(request, self.price, scope, self.model.name, self.endpoint, batch)
                    broke = grant == "over_budget"
                    if isinstance(grant, Grant):
                        body = chat_body(request, self.model.served, self.model.settings.cap_name)
                        lines.append(write_line(grant.attempt, body))
                        size += len(lines[-1])
                        self.tally.micro_dollars += grant.reserved
                if not lines:
                    self.ledger.end_batch(batch, "empty")
            if lines:
                made.append((batch, b"".join(lines)))
        return made, broke

    def _create(self, handed_in: tuple[Batch, bytes]) -> Batch:
        """Upload the file and start the batch. An answer that does not come may hide a batch that was made."""
        batch, content = handed_in
        try:
            file = self._insist(lambda: self.files.upload(content))
            for _ in range(TRIES):
                try:
                    remote: str | None = self.files.create(file, {INTENT: batch.intent})
                except Unreachable:
                    remote = self._find(batch)
                if remote is not None:
                    return self._named(batch, remote)
        except Refused as error:
            self._settle_all(batch, Delivery(error=str(error), sent=False), "refused")
            raise AskError(f"model {self.model.name!r}: the provider takes no batch ({error})") from None
        raise AskError(f"model {self.model.name!r}: {self.endpoint} does not say whether it made a batch")

    def _named(self, batch: Batch, remote: str) -> Batch:
        with self.ledger.transaction():
            return self.ledger.name_batch(batch, remote)

    def _find(self, batch: Batch) -> str | None:
        """The provider's name for a batch of which only the intent is known, or None if it never came to be."""
        for patience in (0.0, GRACE):
            time.sleep(patience)
            for view in self._insist(lambda: list(_recent(self.files.all(), batch.created))):
                if (view.get("metadata") or {}).get(INTENT) == batch.intent:
                    return str(view["id"])
        return None

    # Collecting

    def collect_old(self) -> None:
        """Settle what processes that have ended left at the provider."""
        with self.ledger.transaction():
            old = self.ledger.adopt_batches(self.endpoint, self.account)
        for batch in old:
            self.listener.note(f"model {self.model.name!r}: a batch of an earlier run is collected first")
            remote = batch.remote or self._find(batch)
            if remote is None:
                self._settle_all(batch, Delivery(error="the batch was never made", sent=False), "never made")
            else:
                self._collect(self._named(batch, remote))

    def _collect(self, batch: Batch) -> None:
        """Wait until a batch has ended and settle its lines."""
        assert batch.remote is not None  # noqa: S101 (it has been named)
        pause = _pauses()
        try:
            while (view := self._look(batch.remote))["status"] not in ENDED:
                counts = view.get("request_counts") or {}
                self._tell(int(counts.get("completed") or 0))
                time.sleep(next(pause))
        except Gone as error:
            self._settle_all(batch, Delivery(error=f"the provider lost the batch ({error})"), "gone")
            return
        stray = b""
        for file in (view.get("output_file_id"), view.get("error_file_id")):
            if file:
                stray += self._settle(batch, self._insist(lambda name=file: self.files.content(name)))  # type: ignore[misc]
        # A line in neither file: of a batch that failed its check nothing was done, of any other nobody knows.
        reasons = [str(error.get("message")) for error in (view.get("errors") or {}).get("data") or ()]
        if view["status"] == "failed":
            self.fatal = f"the provider refused the batch: {'; '.join(reasons[:2]) or 'it does not say why'}"
        missing = f"the batch is {view['status']} and its files lack this line"
        self._settle_all(batch, Delivery(error=missing, sent=view["status"] != "failed"), view["status"], stray)

    def _look(self, remote: str) -> dict[str, Any]:
        return self._insist(lambda: self.files.look(remote))

    def _settle(self, batch: Batch, content: bytes) -> bytes:
        """Settle the lines of a file, whatever their order; returns those that name no attempt of the batch."""
        attempts = self.ledger.batch_attempts(batch)
        stray = []
        lines = content.splitlines(keepends=True)
        for start in range(0, len(lines), CHUNK):
            with self.ledger.transaction():
                for line in lines[start : start + CHUNK]:
                    number, delivery = read_line(line)
                    if number not in attempts:
                        stray.append(line)
                    elif (attempt := attempts[number]) is not None:
                        self._close(batch, *attempt, delivery)
                        attempts[number] = None
        return b"".join(stray)

    def _settle_all(self, batch: Batch, delivery: Delivery, how: str, stray: bytes = b"") -> None:
        """Settle what is left of a batch in one way, and the batch with it."""
        with self.ledger.transaction():
            for attempt in self.ledger.batch_attempts(batch).values():
                if attempt is not None:
                    self._close(batch, *attempt, delivery)
            self.ledger.end_batch(batch, how, stray)

    def _close(self, batch: Batch, grant: Grant, request: Request, delivery: Delivery) -> None:
        outcome = judge(request, delivery, batch.price)
        self.ledger.settle(grant, request, batch.scope, delivery, outcome, time.time() - batch.created)
        if outcome.charge is not None:
            self.tally.micro_dollars += outcome.charge - grant.reserved
        self._decide(request, outcome)

    def _decide(self, request: Request, outcome: Outcome) -> None:
        """Count it, or ask again in the next batch, or give up on it."""
        self.tries[request.key] += 1
        if outcome.kind in FINAL:
            self.tally.answered += outcome.response is not None and outcome.response.settles(request)
            if outcome.kind == "refused":  # as often as it is asked
                self.given_up.add(request.key)
        elif outcome.kind == "fatal":
            self.fatal = outcome.message
        elif outcome.kind == "rejected" or self.tries[request.key] >= TRIES:
            self.tally.failed.append(outcome.message)
            self.given_up.add(request.key)

    def _insist(self, call: Callable[[], T]) -> T:
        """Try again while nobody answers; what is at the provider does not run away."""
        for pause in PAUSES:
            try:
                return call()
            except Unreachable as error:
                reason = str(error)
                time.sleep(pause)
        raise AskError(
            f"model {self.model.name!r}: {self.endpoint} does not answer ({reason}); nothing is lost, run "
            "again to collect what it has done"
        )

    def _tell(self, under_way: int = 0) -> None:
        tally = self.tally
        self.listener.report(tally.stored + tally.answered + len(tally.failed) + under_way, tally.micro_dollars)


def _pauses() -> Iterator[float]:
    yield from PAUSES
    while True:
        yield PAUSES[-1]


def _recent(views: Iterable[dict[str, Any]], since: float) -> Iterable[dict[str, Any]]:
    """Batches of a listing, newest first, that are not older than ``since``, clocks being what they are."""
    for view in views:
        if view.get("created_at", since) < since - 3600:
            return
        yield view
