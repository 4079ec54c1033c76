"""What the lines of a batch's result files come to: each settles its attempt, and a line of nobody is kept."""

from __future__ import annotations

import time
from collections import Counter

from stepladder.ask.ledger import CHUNK, Batch, Grant, Ledger
from stepladder.ask.outcome import FINAL, Delivery, Outcome, judge
from stepladder.ask.remote.batch_lines import read_line
from stepladder.ask.remote.engine import MAX_ATTEMPTS
from stepladder.ask.remote.listener import Note
from stepladder.ask.remote.tally import Tally
from stepladder.ask.request import Request

MAX_STRAY_BYTES = 1_000_000
"""Of the lines that belong to nothing, as they are kept."""


class BatchResults:
    """The results of one model's batches during one call. ``name`` is the model's; ``tally`` counts them."""

    def __init__(self, name: str, ledger: Ledger, tally: Tally, note: Note) -> None:
        self._name, self._ledger, self._tally, self._note = name, ledger, tally, note
        self._attempts: Counter[str] = Counter()
        self.given_up: set[str] = set()
        """Keys of requests that no further batch may contain."""
        self.fatal_message: str | None = None
        """Why no further batch would be accepted."""

    def settle_lines(self, batch: Batch, content: bytes, attempts: dict[int, tuple[Grant, Request] | None]) -> bytes:
        """Settle the attempts that have a line in a result file; returns the lines that belong to no attempt of the
        batch."""
        stray = []
        lines = content.splitlines(keepends=True)
        for start in range(0, len(lines), CHUNK):
            with self._ledger.transaction():
                for line in lines[start : start + CHUNK]:
                    attempt_id, delivery = read_line(line)
                    if attempt_id not in attempts:
                        stray.append(line)
                    elif (attempt := attempts[attempt_id]) is not None:
                        self._settle_attempt(batch, *attempt, delivery)
                        attempts[attempt_id] = None
        return b"".join(stray)

    def settle_rest(
        self, batch: Batch, delivery: Delivery, status: str, stray: bytes = b"", *, counts: bool = True
    ) -> None:
        """Settle the remaining attempts of a batch with one delivery, and end the batch. Unless it ``counts``, no
        request is nearer to being given up by it."""
        with self._ledger.transaction():
            for attempt in self._ledger.batch_attempts(batch).values():
                if attempt is not None:
                    self._attempts[attempt[1].key] -= not counts
                    self._settle_attempt(batch, *attempt, delivery)
            self._ledger.end_batch(batch, status, stray[:MAX_STRAY_BYTES])

    def _settle_attempt(self, batch: Batch, grant: Grant, request: Request, delivery: Delivery) -> None:
        judged = judge(request, delivery, batch.price)
        seconds = max(0.0, time.time() - batch.created)
        outcome = self._ledger.settle(grant, request, batch.scope, delivery, judged, seconds)
        self._tally.flag(self._name, outcome, self._note)
        if outcome.charge is not None:
            self._tally.micro_dollars += outcome.charge - grant.reserved
        self._count(request, outcome)

    def _count(self, request: Request, outcome: Outcome) -> None:
        """Count a request as answered or failed; otherwise the next batch will contain it again."""
        self._attempts[request.key] += 1
        if outcome.response is not None:
            self._tally.answered_micro_dollars += outcome.response.micro_dollars
        if outcome.kind in FINAL:
            self._tally.answered += outcome.response is not None and outcome.response.settles(request)
            if outcome.kind == "refused":  # it would be refused again
                self.given_up.add(request.key)
        elif outcome.kind == "fatal":
            self.fatal_message = outcome.message
        elif outcome.kind == "rejected" or self._attempts[request.key] >= MAX_ATTEMPTS:
            self._tally.failed.append(outcome.message)
            self.given_up.add(request.key)
