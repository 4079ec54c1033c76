"""Opening a ledger's file: is it one, is it whole, and which version wrote it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from stepladder.ask.ledger import faults
from stepladder.ask.ledger.private import make_private
from stepladder.ask.ledger.schema import APPLICATION_ID, MIGRATIONS
from stepladder.errors import LedgerError
from stepladder.workspace import MANIFEST

EMPTY_WAIT_SECONDS = 1.0
"""A file that another process is creating has no bytes for a moment."""
POLL_SECONDS = 0.05


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger to read and write, creating or migrating it.

    Raises:
        LedgerError: it is no ledger, or cannot be made.
        sqlite3.Error: see :func:`faults.explain`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_emptied(path)
        make_private(path)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be opened ({error}); choose a folder you can write to") from None
    db = _connect(str(path))
    try:
        number = version(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if number < len(MIGRATIONS):
            _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open a ledger to read, also where its folder cannot be written.

    Raises:
        LedgerError: it is no ledger.
        sqlite3.Error: see :func:`faults.explain`.
    """
    _refuse_emptied(path)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        db = _connect(uri, uri=True)
        db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        # SQLite needs a shared-memory file beside the ledger, unless it may take for granted that nobody writes to it.
        log = path.with_name(f"{path.name}-wal")
        if not path.is_file() or (log.exists() and log.stat().st_size > 0):
            raise
        db = _connect(f"{uri}&immutable=1", uri=True)
        db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    return db


def version(db: sqlite3.Connection, path: Path) -> int:
    """The number of migrations that the file has had; 0: it is new.

    Raises:
        LedgerError: another program's file, or a newer version's.
    """
    application = db.execute("PRAGMA application_id").fetchone()[0]
    number = int(db.execute("PRAGMA user_version").fetchone()[0])
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if application not in (0, APPLICATION_ID) or ("requests" not in tables if number else tables):
        raise LedgerError(f"{path}: not a usable ledger (another program's SQLite file); name another folder or file")
    if number > len(MIGRATIONS):
        raise LedgerError(f"{path}: written by a newer Stepladder; upgrade this one")
    return number


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(
        name, timeout=faults.BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri
    )  # fmt: skip


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")  # when the connection is closed without COMMIT, it is rolled back
    for migration in MIGRATIONS[version(db, path) :]:  # another process may have done it meanwhile
        for statement in _statements(migration):
            db.execute(statement)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; those of a trigger hold others."""
    statement = ""
    for piece in script.split(";"):
        statement += f"{piece};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _refuse_emptied(path: Path) -> None:
    """Refuse a file without a byte beside finished samples: it was a ledger, and a new one would buy every answer
    again, with whole caps. Beside nothing but questions it is one whose creation was killed.

    Raises:
        LedgerError: it is.
    """
    deadline = time.monotonic() + EMPTY_WAIT_SECONDS
    while path.is_file() and path.stat().st_size == 0:
        if next(path.parent.glob(f"*/samples/{MANIFEST}"), None) is None:
            return
        if time.monotonic() >= deadline:
            raise LedgerError(
                f"{path}: is empty (0 bytes), but the runs beside it are not new; put a backup in its place, or delete "
                "the empty file to start a new ledger, with whole caps and without answers"
            )
        time.sleep(POLL_SECONDS)
