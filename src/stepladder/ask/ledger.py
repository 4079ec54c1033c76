"""The ledger: every model call ever made, in one SQLite file beside the runs. The only SQL of the package."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from stepladder.ask.request import Request, Response
from stepladder.errors import UserError

MIGRATIONS = (
    """
    CREATE TABLE requests (
        key TEXT PRIMARY KEY,
        identity TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE responses (
        key TEXT NOT NULL REFERENCES requests (key),
        max_tokens INTEGER NOT NULL,
        run TEXT NOT NULL,
        text TEXT NOT NULL,
        finished INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        micro_dollars INTEGER NOT NULL,
        PRIMARY KEY (key, max_tokens)
    ) WITHOUT ROWID;
    """,
)
"""Append-only: a migration that has shipped is never edited; ``PRAGMA user_version`` counts those applied."""


class Ledger:
    """Open ``path``, creating or migrating it. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{path}: not a usable ledger ({error}); move it away to start a new one") from None

    def _migrate(self, path: Path) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            self._db.execute("ROLLBACK")
            raise UserError(f"{path}: written by a newer Stepladder; upgrade this one")
        for migration in MIGRATIONS[version:]:
            for statement in migration.split(";"):
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        self._db.execute("COMMIT")

    def find(self, request: Request) -> Response | None:
        """The stored response that serves the request, or None. The longest one wins."""
        row = self._db.execute(
            "SELECT text, finished, max_tokens, prompt_tokens, completion_tokens, micro_dollars FROM responses"
            " WHERE key = ? AND (finished OR max_tokens >= ?) ORDER BY finished DESC, max_tokens DESC LIMIT 1",
            (request.key, request.max_tokens),
        ).fetchone()
        if row is None:
            return None
        text, finished, max_tokens, prompt_tokens, completion_tokens, micro_dollars = row
        return Response(
            text=text,
            finished=bool(finished),
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            micro_dollars=micro_dollars,
        )

    def store(self, run: str, answers: Iterable[tuple[Request, Response]]) -> None:
        """Commit a group of answers in one transaction; when this returns they are on the disk.

        The first answer to a request stays: storing another under the same key and cap changes nothing.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for request, r in answers:
                self._db.execute("INSERT OR IGNORE INTO requests VALUES (?, ?)", (request.key, request.identity()))
                self._db.execute(
                    "INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (request.key, r.max_tokens, run, r.text, r.finished,
                     r.prompt_tokens, r.completion_tokens, r.micro_dollars),
                )  # fmt: skip
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def spent(self, run: str) -> int:
        """Micro-dollars the run has spent."""
        total = self._db.execute("SELECT COALESCE(SUM(micro_dollars), 0) FROM responses WHERE run = ?", (run,))
        return int(total.fetchone()[0])

    def calls(self, run: str) -> int:
        """Responses the run has caused."""
        return int(self._db.execute("SELECT COUNT(*) FROM responses WHERE run = ?", (run,)).fetchone()[0])

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
