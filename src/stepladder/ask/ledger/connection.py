"""The ledger's file: opening, migrations, transactions, and which of the processes that write to it still run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from stepladder.ask.ledger.private import OWNER_ONLY, make_private
from stepladder.ask.ledger.schema import MIGRATIONS
from stepladder.errors import UserError

CHUNK = 500
"""Keys looked up in one SQL statement."""


class Connection:
    """Open ``path``, creating or migrating it. Use as a context manager.

    A session is the id of a process that opens attempts. The lock on the session's file shows whether that process
    still runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: int | None = None
        self._lock: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make_private(path)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise UserError(f"{path}: cannot be opened ({error}); choose a folder you can write to") from None
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

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction: committed to the disk when the block ends, rolled back when it raises."""
        self.begin()
        try:
            yield
        except BaseException:
            self.rollback()
            raise
        self.commit()

    def begin(self) -> None:
        """Open a transaction, after the transactions of other processes."""
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Commit the transaction; when this returns, its writes are on the disk."""
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Roll the transaction back, if one is open."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def begin_session(self) -> None:
        """Register this process, before it opens an attempt. It holds the lock on its session's file until it ends,
        even if it is killed."""
        if self._session is None:
            inserted = self._db.execute("INSERT INTO sessions (pid, started) VALUES (?, ?)", (os.getpid(), time.time()))
            self._session = int(inserted.lastrowid or 0)
            self._lock = os.open(self._session_file(self._session), os.O_CREAT | os.O_RDWR, OWNER_ONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _session_file(self, session: int) -> Path:
        return self.path.with_name(f".{self.path.name}.session-{session}")

    def _is_alive(self, session: int) -> bool:
        if session == self._session:
            return True
        try:
            handle = os.open(self._session_file(session), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        self._session_file(session).unlink(missing_ok=True)
        return False

    def close(self) -> None:
        self._db.close()
        if self._lock is not None:
            self._session_file(self._session or 0).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
