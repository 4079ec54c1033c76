"""Sums of a run's requests by rung and model, and the export of everything in the ledger."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

from stepladder.ask.ledger.connection import Connection
from stepladder.ask.ledger.entries import Account, Recent, Scope
from stepladder.ask.ledger.packing import unpacked, unpacked_text

MAX_RECENT = 20_000
MAX_FAILURES = 10


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
        row = self._db.execute("SELECT responses FROM answers WHERE run = ?", (run,)).fetchone()
        return 0 if row is None else int(row[0])

    def accounts(self, run: str) -> list[Account]:
        """The run's account for each rung and model, most expensive first."""
        totals: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        columns = "rung, model, outcome, attempts, micro_dollars, prompt_tokens, completion_tokens"
        query = f"SELECT {columns} FROM totals WHERE run = ? AND attempts ORDER BY attempts DESC, outcome"  # noqa: S608
        for rung, model, outcome, *sums in self._db.execute(query, (run,)):
            totals.setdefault((rung, model), {})[outcome or "open"] = tuple(sums)
        seconds: dict[tuple[str, str], dict[float, int]] = {}
        query = "SELECT rung, model, seconds, attempts FROM durations WHERE run = ? ORDER BY seconds"
        for rung, model, duration, count in self._db.execute(query, (run,)):
            seconds.setdefault((rung, model), {})[duration] = count
        query = "SELECT rung, model, count FROM hits WHERE run = ?"
        hits = {(rung, model): count for rung, model, count in self._db.execute(query, (run,))}
        accounts = []
        for rung, model in totals.keys() | hits.keys():
            by_outcome = totals.get((rung, model), {})
            sums = [sum(column) for column in zip(*by_outcome.values(), strict=True)] or [0, 0, 0, 0]
            _, micro_dollars, prompt_tokens, completion_tokens = sums
            accounts.append(
                Account(
                    rung=rung,
                    model=model,
                    micro_dollars=micro_dollars,
                    outcomes={outcome: attempts for outcome, (attempts, *_) in by_outcome.items()},
                    prompt_tokens=prompt_tokens,
                    completion_tokens=completion_tokens,
                    hits=hits.get((rung, model), 0),
                    seconds=seconds.get((rung, model), {}),
                )
            )
        return sorted(accounts, key=lambda account: (-account.micro_dollars, account.rung, account.model))

    def recent(self, run: str, seconds: float) -> Recent:
        """What a run's requests brought in the last ``seconds``, of its last :data:`MAX_RECENT` at most."""
        now_seconds = time.time()
        last = "run = ? AND id > (SELECT MAX(id) FROM attempts) - ?"
        sums = "COALESCE(SUM(completion_tokens), 0), COALESCE(SUM(charged), 0)"
        query = f"SELECT {sums} FROM attempts WHERE {last} AND started + seconds > ?"  # noqa: S608
        tokens, micro_dollars = self._db.execute(query, (run, MAX_RECENT, now_seconds - seconds)).fetchone()
        columns = "model, outcome, message, ? - (started + seconds)"
        query = f"SELECT {columns} FROM attempts WHERE {last} AND outcome != 'answered' ORDER BY id DESC LIMIT ?"  # noqa: S608
        failures = self._db.execute(query, (now_seconds, run, MAX_RECENT, MAX_FAILURES)).fetchall()
        return Recent(tokens, micro_dollars, failures)

    def export(self) -> Iterator[dict[str, Any]]:
        """Every attempt with its request and raw response, then every response of weights in this process."""
        self._db.row_factory = sqlite3.Row
        try:
            for row in self._db.execute(
                "SELECT key, attempts.*, identity FROM attempts JOIN requests ON requests.id = request"
                " ORDER BY attempts.id"
            ):
                raw = row["raw"] if row["body"] is None else unpacked(row["body"])
                hidden = ("request", "identity", "raw", "body", "session")
                yield {
                    **{name: row[name] for name in row.keys() if name not in hidden},  # noqa: SIM118
                    "request": json.loads(unpacked_text(row["identity"])),
                    "raw": None if raw is None else raw.decode(errors="replace"),
                }
            local_responses = (
                "SELECT key, responses.*, identity FROM responses JOIN requests ON requests.id = request"
                " WHERE attempt IS NULL"
            )
            for row in self._db.execute(local_responses):
                columns = ("key", "run", "max_tokens", "finish", "prompt_tokens", "completion_tokens")
                text = unpacked_text(row["text"])
                yield {
                    **{name: row[name] for name in columns},
                    "text": text,
                    "request": json.loads(unpacked_text(row["identity"])),
                }
        finally:
            self._db.row_factory = None
