"""Batches: requests sent to a provider's batch API in one file, which outlive the process that sent them."""

from __future__ import annotations

import json
import time
import uuid

from stepladder.ask.ledger.connection import Connection
from stepladder.ask.ledger.entries import Batch, Grant, Scope, UnfinishedBatch
from stepladder.ask.ledger.packing import unpacked_text
from stepladder.ask.request import Request
from stepladder.config import Price


class Batches(Connection):
    """All methods but the last two must be called inside a transaction."""

    def open_batch(self, scope: Scope, endpoint: str, account: str, price: Price) -> Batch:
        """Record a batch before it is created at the provider. ``account`` names the model and the variable of the API
        key."""
        batch = Batch(0, uuid.uuid4().hex, Scope(scope.run, scope.rung), price, None, time.time())
        row = self._db.execute(
            "INSERT INTO batches (intent, session, run, rung, endpoint, account, price, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                batch.intent, self._session, scope.run, scope.rung, endpoint, account, price.model_dump_json(),
                batch.created,
            ),
        ).lastrowid  # fmt: skip
        return batch._replace(id=int(row or 0))

    def name_batch(self, batch: Batch, remote: str) -> Batch:
        """Record the provider's id of the batch."""
        self._db.execute("UPDATE batches SET remote = ? WHERE id = ?", (remote, batch.id))
        return batch._replace(remote=remote)

    def end_batch(self, batch: Batch, status: str, stray: bytes = b"") -> None:
        """Record that the batch has ended and its attempts are settled; ``stray`` are lines of its result files that
        belong to none of them."""
        self._db.execute("UPDATE batches SET ended = ?, stray = ? WHERE id = ?", (status, stray or None, batch.id))

    def adopt_batches(self, endpoint: str, account: str) -> list[Batch]:
        """Take over the batches of this account that have not ended but whose process has, and return them."""
        rows = self._db.execute(
            "SELECT id, intent, run, rung, price, remote, created, session FROM batches"
            " WHERE ended IS NULL AND endpoint = ? AND account = ? ORDER BY id",
            (endpoint, account),
        ).fetchall()
        if not rows:
            return []
        self.begin_session()
        alive = {session: self._is_alive(session) for session in {row[-1] for row in rows} - {self._session}}
        orphaned = [row for row in rows if not alive.get(row[-1])]
        for row in orphaned:
            for table, key in (("batches", "id"), ("attempts", "batch")):
                self._db.execute(f"UPDATE {table} SET session = ? WHERE {key} = ?", (self._session, row[0]))  # noqa: S608
        return [
            Batch(batch_id, intent, Scope(run, rung), Price.model_validate_json(price), remote, created)
            for batch_id, intent, run, rung, price, remote, created, _ in orphaned
        ]

    def batch_attempts(self, batch: Batch) -> dict[int, tuple[Grant, Request] | None]:
        """The batch's attempts by id; None for those that are settled."""
        rows = self._db.execute(
            "SELECT attempts.id, reserved, max_tokens, identity, outcome"
            " FROM attempts JOIN requests ON requests.id = request WHERE batch = ? ORDER BY attempts.id",
            (batch.id,),
        )
        return {
            attempt: (
                Grant(attempt, reserved, 0),
                Request.model_validate({**json.loads(unpacked_text(identity)), "max_tokens": max_tokens}),
            )
            if outcome is None
            else None
            for attempt, reserved, max_tokens, identity, outcome in rows
        }

    def unfinished_batches(self, run: str) -> list[UnfinishedBatch]:
        """Batches of the run that have not ended."""
        rows = self._db.execute(
            "SELECT remote, COUNT(*), SUM(reserved) FROM batches JOIN attempts ON attempts.batch = batches.id"
            " WHERE batches.run = ? AND ended IS NULL AND outcome IS NULL GROUP BY batches.id ORDER BY batches.id",
            (run,),
        )
        return [UnfinishedBatch(*row) for row in rows]
