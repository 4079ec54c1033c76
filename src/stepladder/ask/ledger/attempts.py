"""Attempts: each reserves its worst-case cost before the request is sent, and is settled by its outcome."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from stepladder.ask.ledger.entries import Batch, Grant, Refusal, Scope, UnsettledAttempt
from stepladder.ask.ledger.packing import packed
from stepladder.ask.ledger.responses import Responses
from stepladder.ask.outcome import Delivery, Outcome
from stepladder.ask.request import Request, worst_case
from stepladder.config import Price

_UNSTORABLE = (
    sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
    OverflowError, TypeError, ValueError,
)  # fmt: skip
"""What SQLite raises at a value, as opposed to the state of its file."""


class Attempts(Responses):
    """A run's spend is the sum over its attempts: of each the settled charge or, while that is unknown, the worst case
    reserved for it. So the sum is never too small, even if a process is killed."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)
        self._spent_cache: dict[tuple[str, str | None], int] = {}
        self._data_version = -1

    def rollback(self) -> None:
        super().rollback()
        self._spent_cache.clear()

    def reserve(
        self,
        request: Request,
        price: Price,
        scope: Scope,
        model: str,
        endpoint: str = "",
        batch: Batch | None = None,
        *,
        again: bool = False,
    ) -> Grant | Refusal:
        """Open an attempt and reserve its worst case, or return why not. Call inside a transaction. ``again``: even if
        another attempt at the request is open."""
        if self.find(request) is not None:
            return "stored"
        open_attempts = self._db.execute(
            "SELECT session FROM attempts WHERE request = (SELECT id FROM requests WHERE key = ?) AND outcome IS NULL",
            (request.key,),
        )
        if not again and any(self._is_alive(session) for (session,) in open_attempts.fetchall()):
            return "busy"
        reserved = worst_case(request, price)
        for rung, cap in ((None, scope.run_cap), (scope.rung, scope.rung_cap)):
            if cap is not None and self._cached_spent(scope.run, rung) + reserved > cap:
                return "over_budget"
        number = self._number_of(request)
        answers = self._db.execute(
            "SELECT COUNT(*) FROM attempts WHERE request = ? AND (body IS NOT NULL OR raw IS NOT NULL)"
            " AND status = 200",
            (number,),
        ).fetchone()[0]
        attempt = self._db.execute(
            "INSERT INTO attempts (request, session, run, rung, model, endpoint, max_tokens, reserved, started, batch)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                self._session,
                scope.run,
                scope.rung,
                model,
                endpoint,
                request.max_tokens,
                reserved,
                time.time(),
                batch.id if batch else None,
            ),
        ).lastrowid
        self._add_to_cache(scope.run, scope.rung, reserved)
        return Grant(int(attempt or 0), reserved, answers)

    def settle(
        self, grant: Grant, request: Request, scope: Scope, delivery: Delivery, outcome: Outcome, seconds: float
    ) -> Outcome:
        """Close an attempt and store its raw bytes, charge and response; returns the outcome that is on record. Call
        inside a transaction. ``seconds`` is how long it took.

        An outcome that the database does not take is replaced by ``malformed``, charged at the worst case: it harms no
        other attempt of the transaction. A database that cannot be written raises its error.
        """
        try:
            self._record(grant, request, scope, delivery, outcome, seconds)
        except _UNSTORABLE as error:
            outcome = Outcome("malformed", None, message=f"a reply that cannot be stored ({type(error).__name__})")
            body = b"" if isinstance(error, sqlite3.DataError) else delivery.body  # which is said of what is too big
            self._record(grant, request, scope, Delivery(delivery.status, body), outcome, seconds)
        if outcome.charge is not None:
            self._add_to_cache(scope.run, scope.rung, outcome.charge - grant.reserved)
        return outcome

    def _record(
        self, grant: Grant, request: Request, scope: Scope, delivery: Delivery, outcome: Outcome, seconds: float
    ) -> None:
        response = outcome.response
        self._db.execute(
            "UPDATE attempts SET charged = ?, outcome = ?, status = ?, message = ?, seconds = ?, prompt_tokens = ?,"
            " completion_tokens = ?, body = ? WHERE id = ?",
            (
                outcome.charge, outcome.kind, delivery.status, outcome.message, seconds,
                response.prompt_tokens if response else 0, response.completion_tokens if response else 0,
                packed(delivery.body) if delivery.body else None, grant.attempt,
            ),
        )  # fmt: skip
        if response is not None:
            self._insert_response(scope.run, request, response, grant.attempt)

    def spent(self, run: str, rung: str | None = None) -> int:
        """Micro-dollars that the run (or one rung of it) has spent; unsettled attempts count at their worst case."""
        condition, values = ("run = ?", [run]) if rung is None else ("run = ? AND rung = ?", [run, rung])
        total = self._db.execute(
            f"SELECT COALESCE(SUM(micro_dollars), 0) FROM totals WHERE {condition}",  # noqa: S608
            values,
        )
        return int(total.fetchone()[0])

    def _cached_spent(self, run: str, rung: str | None) -> int:
        """:meth:`spent`, kept in memory until another process writes to the ledger."""
        version = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        if version != self._data_version:
            self._data_version = version
            self._spent_cache.clear()
        if (run, rung) not in self._spent_cache:
            self._spent_cache[run, rung] = self.spent(run, rung)
        return self._spent_cache[run, rung]

    def _add_to_cache(self, run: str, rung: str, micro_dollars: int) -> None:
        for account in ((run, None), (run, rung)):
            if account in self._spent_cache:
                self._spent_cache[account] += micro_dollars

    def unsettled(self, run: str) -> list[UnsettledAttempt]:
        """The run's attempts without an outcome, oldest first. Those of processes that have ended stay charged at their
        worst case. Attempts in batches are left out: their batch can still be collected."""
        rows = self._db.execute(
            "SELECT id, model, reserved, session FROM attempts"
            " WHERE outcome IS NULL AND run = ? AND batch IS NULL ORDER BY id",
            (run,),
        ).fetchall()
        alive = {session: self._is_alive(session) for session in {row[3] for row in rows}}
        return [
            UnsettledAttempt(attempt, model, reserved, alive[session]) for attempt, model, reserved, session in rows
        ]
