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

from stepladder.ask.ledger import opening
from stepladder.ask.ledger.faults import explain
from stepladder.ask.ledger.schema import MIGRATIONS
from stepladder.workspace import is_held, open_itself

CHUNK = 500
"""Keys looked up in one SQL statement."""


class Connection:
    """Open ``path``, creating or migrating it. Use as a context manager: an error of the file that leaves the block
    becomes a LedgerError.

    A session is the id of a process that opens attempts. The lock on the session's file shows whether that process
    still runs.

    Args:
        path: the SQLite file.
        read_only: change nothing; the file must be there. One of an older version is migrated all the same.

    Raises:
        LedgerError: it cannot be opened, is damaged or is no ledger; the message tells these apart.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._session: int | None = None
        self._lock: int | None = None
        self._read_only = read_only
        with self._explained():
            if read_only:
                self._db = opening.connect_read_only(path)
                if opening.version(self._db, path) == len(MIGRATIONS):
                    return
                self._db.close()
            self._db = opening.connect(path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._explain(error)
            raise

    def _explain(self, error: sqlite3.Error) -> None:
        """Raise what an error of the file means."""
        if (explained := explain(self.path, error)) is not None:
            raise explained from error

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
            self._lock = open_itself(self._session_file(self._session), os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _session_file(self, session: int) -> Path:
        return self.path.with_name(f".{self.path.name}.session-{session}")

    def _is_alive(self, session: int) -> bool:
        if session == self._session:
            return True
        if is_held(self._session_file(session)):
            return True
        if not self._read_only:
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
        if isinstance(error, sqlite3.Error):
            self._explain(error)
