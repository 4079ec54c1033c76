"""Sums of a run's requests by rung and model, and the export of everything in the ledger."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stepladder.ask.ledger.connection import Connection
from stepladder.ask.ledger.entries import Account, Scope


class Accounts(Connection):
    """The reading side of the ledger, and the counts of requests it answered itself."""

    def add_hits(self, scope: Scope, model: str, count: int) -> None:
        """Count requests that were answered from the ledger. Call inside a transaction."""
        self._db.execute(
            "INSERT INTO hits VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            (*scope[:2], model, count),
        )

    def calls(self, run: str) -> int:
        """Number of responses that the run added."""
        return int(self._db.execute("SELECT COUNT(*) FROM responses WHERE run = ?", (run,)).fetchone()[0])

    def accounts(self, run: str) -> list[Account]:
        """The run's account for each rung and model, most expensive first."""
        attempts = self._db.execute(
            "SELECT rung, model, outcome, COALESCE(charged, reserved), prompt_tokens, completion_tokens, seconds"
            " FROM attempts WHERE run = ?",
            (run,),
        )
        rows_by_account: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        for rung, model, *columns in attempts:
            rows_by_account.setdefault((rung, model), []).append(tuple(columns))
        hits = {
            (rung, model): count
            for rung, model, count in self._db.execute("SELECT rung, model, count FROM hits WHERE run = ?", (run,))
        }
        accounts = []
        for rung, model in rows_by_account.keys() | hits.keys():
            rows = rows_by_account.get((rung, model), [])
            accounts.append(
                Account(
                    rung=rung,
                    model=model,
                    micro_dollars=sum(row[1] for row in rows),
                    outcomes=dict(Counter(row[0] or "open" for row in rows).most_common()),
                    prompt_tokens=sum(row[2] for row in rows),
                    completion_tokens=sum(row[3] for row in rows),
                    hits=hits.get((rung, model), 0),
                    seconds=tuple(sorted(row[4] for row in rows if row[4] is not None)),
                )
            )
        return sorted(accounts, key=lambda account: (-account.micro_dollars, account.rung, account.model))

    def export(self) -> Iterator[dict[str, Any]]:
        """Every attempt with its request and raw response, then every response of weights in this process."""
        self._db.row_factory = sqlite3.Row
        try:
            for row in self._db.execute(
                "SELECT attempts.*, identity FROM attempts JOIN requests USING (key) ORDER BY id"
            ):
                raw = row["raw"]
                yield {
                    **{name: row[name] for name in row.keys() if name not in ("identity", "raw", "session")},  # noqa: SIM118
                    "request": json.loads(row["identity"]),
                    "raw": None if raw is None else raw.decode(errors="replace"),
                }
            local_responses = (
                "SELECT responses.*, identity FROM responses JOIN requests USING (key) WHERE attempt IS NULL"
            )
            for row in self._db.execute(local_responses):
                columns = ("key", "run", "max_tokens", "finish", "prompt_tokens", "completion_tokens", "text")
                yield {**{name: row[name] for name in columns}, "request": json.loads(row["identity"])}
        finally:
            self._db.row_factory = None
