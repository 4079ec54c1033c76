"""What a run did with its models, for people to read."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stepladder.ask.ledger.connection import Connection
from stepladder.ask.ledger.entries import Account, Scope


class Accounts(Connection):
    """Sums by rung and model, and everything as it was sent and received."""

    def hit(self, scope: Scope, model: str, count: int) -> None:
        """Note that so many requests were answered from here. Inside a transaction."""
        self._db.execute(
            "INSERT INTO hits VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            (*scope[:2], model, count),
        )

    def calls(self, run: str) -> int:
        """Responses the run has caused."""
        return int(self._db.execute("SELECT COUNT(*) FROM responses WHERE run = ?", (run,)).fetchone()[0])

    def accounts(self, run: str) -> list[Account]:
        """What the run did with each model on each rung, dearest first."""
        attempts = self._db.execute(
            "SELECT rung, model, outcome, COALESCE(charged, reserved), prompt_tokens, completion_tokens, seconds"
            " FROM attempts WHERE run = ?",
            (run,),
        )
        found: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        for rung, model, *rest in attempts:
            found.setdefault((rung, model), []).append(tuple(rest))
        hits = {
            (rung, model): count
            for rung, model, count in self._db.execute("SELECT rung, model, count FROM hits WHERE run = ?", (run,))
        }
        accounts = []
        for rung, model in found.keys() | hits.keys():
            rows = found.get((rung, model), [])
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
        """Every attempt with its request and raw response, then every answer of weights in this process."""
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
            own = "SELECT responses.*, identity FROM responses JOIN requests USING (key) WHERE attempt IS NULL"
            for row in self._db.execute(own):
                kept = ("key", "run", "max_tokens", "finish", "prompt_tokens", "completion_tokens", "text")
                yield {**{name: row[name] for name in kept}, "request": json.loads(row["identity"])}
        finally:
            self._db.row_factory = None
