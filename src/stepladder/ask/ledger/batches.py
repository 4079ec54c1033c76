"""Batches: requests handed to a provider in one file, which outlive the process that sent them."""

from __future__ import annotations

import json
import time
import uuid

from stepladder.ask.ledger.connection import Connection
from stepladder.ask.ledger.entries import Batch, Grant, Scope, Waiting
from stepladder.ask.request import Request
from stepladder.config import Price


class Batches(Connection):
    """All but the last two methods are called inside a transaction."""

    def open_batch(self, scope: Scope, endpoint: str, account: str, price: Price) -> Batch:
        """Write down that a batch is going to be made. ``account`` says which model, and with whose key."""
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
        """The provider has taken it, under this name."""
        self._db.execute("UPDATE batches SET remote = ? WHERE id = ?", (remote, batch.id))
        return batch._replace(remote=remote)

    def end_batch(self, batch: Batch, how: str, stray: bytes = b"") -> None:
        """It has ended, and all its attempts are settled; ``stray`` are lines of its files that name none of them."""
        self._db.execute("UPDATE batches SET ended = ?, stray = ? WHERE id = ?", (how, stray or None, batch.id))

    def adopt_batches(self, endpoint: str, account: str) -> list[Batch]:
        """Batches of this account that have not ended and whose process has: they are this process's now."""
        rows = self._db.execute(
            "SELECT id, intent, run, rung, price, remote, created, session FROM batches"
            " WHERE ended IS NULL AND endpoint = ? AND account = ? ORDER BY id",
            (endpoint, account),
        ).fetchall()
        if not rows:
            return []
        self.begin_session()
        alive = {session: self._is_alive(session) for session in {row[-1] for row in rows} - {self._session}}
        found = [row for row in rows if not alive.get(row[-1])]
        for row in found:
            for table, key in (("batches", "id"), ("attempts", "batch")):
                self._db.execute(f"UPDATE {table} SET session = ? WHERE {key} = ?", (self._session, row[0]))  # noqa: S608
        return [
            Batch(number, intent, Scope(run, rung), Price.model_validate_json(price), remote, created)
            for number, intent, run, rung, price, remote, created, _ in found
        ]

    def in_batch(self, batch: Batch) -> dict[int, tuple[Grant, Request] | None]:
        """Its attempts by number; None where one is settled."""
        rows = self._db.execute(
            "SELECT id, reserved, max_tokens, identity, outcome FROM attempts JOIN requests USING (key)"
            " WHERE batch = ? ORDER BY id",
            (batch.id,),
        )
        return {
            attempt: (
                Grant(attempt, reserved, 0),
                Request.model_validate({**json.loads(identity), "max_tokens": max_tokens}),
            )
            if outcome is None
            else None
            for attempt, reserved, max_tokens, identity, outcome in rows
        }

    def waiting(self, run: str) -> list[Waiting]:
        """Batches of the run that have not ended."""
        rows = self._db.execute(
            "SELECT remote, COUNT(*), SUM(reserved) FROM batches JOIN attempts ON attempts.batch = batches.id"
            " WHERE batches.run = ? AND ended IS NULL AND outcome IS NULL GROUP BY batches.id ORDER BY batches.id",
            (run,),
        )
        return [Waiting(*row) for row in rows]
