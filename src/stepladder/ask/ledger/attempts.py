"""Attempts: money set aside before a request is sent, and settled when what came back is known."""

from __future__ import annotations

import time
from pathlib import Path

from stepladder.ask.ledger.entries import Batch, Grant, Open, Refusal, Scope
from stepladder.ask.ledger.responses import Responses
from stepladder.ask.outcome import Delivery, Outcome
from stepladder.ask.request import Request, worst_case
from stepladder.config import Price


class Attempts(Responses):
    """What a run has spent is the sum of its attempts, each at its settled charge or, while that is unknown, at the
    worst case reserved for it; so whatever happens to a process, the sum is never too small."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._sums: dict[tuple[str, str | None], int] = {}
        self._version = -1

    def rollback(self) -> None:
        super().rollback()
        self._sums.clear()

    def reserve(
        self,
        request: Request,
        price: Price,
        scope: Scope,
        model: str,
        endpoint: str = "",
        batch: Batch | None = None,
    ) -> Grant | Refusal:
        """Set the worst case aside and open an attempt, or say why not. Inside a transaction."""
        if self.find(request) is not None:
            return "stored"
        rivals = self._db.execute("SELECT session FROM attempts WHERE key = ? AND outcome IS NULL", (request.key,))
        if any(self._is_alive(session) for (session,) in rivals.fetchall()):
            return "busy"
        worst = worst_case(request, price)
        for rung, cap in ((None, scope.run_cap), (scope.rung, scope.rung_cap)):
            if cap is not None and self._sum(scope.run, rung) + worst > cap:
                return "broke"
        self._remember(request)
        answers = self._db.execute(
            "SELECT COUNT(*) FROM attempts WHERE key = ? AND raw IS NOT NULL AND status = 200", (request.key,)
        ).fetchone()[0]
        attempt = self._db.execute(
            "INSERT INTO attempts (key, session, run, rung, model, endpoint, max_tokens, reserved, started, batch)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                request.key,
                self._session,
                scope.run,
                scope.rung,
                model,
                endpoint,
                request.max_tokens,
                worst,
                time.time(),
                batch.id if batch else None,
            ),
        ).lastrowid
        self._add(scope.run, scope.rung, worst)
        return Grant(int(attempt or 0), worst, answers)

    def settle(
        self, grant: Grant, request: Request, scope: Scope, delivery: Delivery, outcome: Outcome, seconds: float
    ) -> None:
        """Close an attempt: its bytes, its charge, its response. Inside a transaction."""
        response = outcome.response
        self._db.execute(
            "UPDATE attempts SET charged = ?, outcome = ?, status = ?, message = ?, seconds = ?, prompt_tokens = ?,"
            " completion_tokens = ?, raw = ? WHERE id = ?",
            (
                outcome.charge, outcome.kind, delivery.status, outcome.message, seconds,
                response.prompt_tokens if response else 0, response.completion_tokens if response else 0,
                delivery.body or None, grant.attempt,
            ),
        )  # fmt: skip
        if outcome.charge is not None:
            self._add(scope.run, scope.rung, outcome.charge - grant.worst)
        if response is not None:
            self._respond(scope.run, request, response, grant.attempt)

    def spent(self, run: str, rung: str | None = None) -> int:
        """Micro-dollars the run (or one rung of it) has spent, attempts of unknown outcome at their worst."""
        where, values = ("run = ?", [run]) if rung is None else ("run = ? AND rung = ?", [run, rung])
        total = self._db.execute(
            f"SELECT COALESCE(SUM(COALESCE(charged, reserved)), 0) FROM attempts WHERE {where}",  # noqa: S608
            values,
        )
        return int(total.fetchone()[0])

    def _sum(self, run: str, rung: str | None) -> int:
        """:meth:`spent`, added up once and kept while no other process writes."""
        version = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        if version != self._version:
            self._version = version
            self._sums.clear()
        if (run, rung) not in self._sums:
            self._sums[run, rung] = self.spent(run, rung)
        return self._sums[run, rung]

    def _add(self, run: str, rung: str, micro_dollars: int) -> None:
        for account in ((run, None), (run, rung)):
            if account in self._sums:
                self._sums[account] += micro_dollars

    def unsettled(self, run: str) -> list[Open]:
        """The run's attempts without an outcome, oldest first; those of dead processes stay charged at their worst.
        Those in batches are not among them: they can still be collected."""
        rows = self._db.execute(
            "SELECT id, model, reserved, session FROM attempts"
            " WHERE outcome IS NULL AND run = ? AND batch IS NULL ORDER BY id",
            (run,),
        ).fetchall()
        alive = {session: self._is_alive(session) for session in {row[3] for row in rows}}
        return [Open(attempt, model, reserved, alive[session]) for attempt, model, reserved, session in rows]
