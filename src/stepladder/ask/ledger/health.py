"""Whether a ledger is whole, and its backup."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from stepladder.ask.ledger.connection import CHUNK, Connection
from stepladder.ask.ledger.faults import damaged, network_file_system
from stepladder.ask.ledger.packing import packed
from stepladder.errors import LedgerError
from stepladder.workspace import sync_folder

MAX_CHECKED_BYTES = 256 * 2**20
"""Largest ledger that is checked at the start of a run; 256 MiB take about a second."""


class Health(Connection):
    """The ledger as a file."""

    def check(self) -> list[str]:
        """Look for damage (``PRAGMA quick_check``), and return what a user should know about the file, a line each.

        Raises:
            LedgerError: it is damaged.
        """
        notes = []
        size = self.path.stat().st_size
        if size > MAX_CHECKED_BYTES:
            notes.append(
                f"{self.path}: not checked for damage, since it has {size / 2**20:,.0f} MiB (checked are up to "
                f"{MAX_CHECKED_BYTES / 2**20:,.0f}); 'sqlite3 {self.path} \"PRAGMA quick_check\"' does it"
            )
        else:
            check_result = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if check_result != "ok":
                raise damaged(self.path, check_result)
        if (kind := network_file_system(self.path)) is not None:
            notes.append(
                f"{self.path}: lies on a network file system ({kind}), where the locks between processes may fail: use "
                "it from one machine only, or give --runs a folder on a local disk"
            )
        return notes

    def compact(self) -> None:
        """Compress what older versions stored as it came, and return free space to the disk. That takes room for a copy
        of the file, and every other process has to wait. A kill loses nothing."""
        tables = (
            ("attempts", "id", "raw", "raw = NULL, body = ?", "raw IS NOT NULL"),
            ("requests", "key", "identity", "identity = ?", "TYPEOF(identity) = 'text'"),
        )
        for table, key, column, change, is_old in tables:
            query = f"SELECT {column}, {key} FROM {table} WHERE {is_old} LIMIT {CHUNK}"  # noqa: S608
            while rows := self._db.execute(query).fetchall():
                packed_rows = [
                    (packed(content if column == "raw" else content.encode()), name) for content, name in rows
                ]
                with self.transaction():
                    self._db.executemany(f"UPDATE {table} SET {change} WHERE {key} = ?", packed_rows)  # noqa: S608
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def back_up(self, file: Path) -> None:
        """Write a copy as of now, also while other processes write to the ledger.

        Raises:
            LedgerError: the file is there already, or cannot be written.
        """
        if file.exists() or file.is_symlink():
            raise LedgerError(f"{file}: is there already; name a new file for the backup")
        partial = file.with_name(f".{file.name}.partial")
        try:
            partial.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(partial)) as copy:
                self._db.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file that is all of it
            partial.chmod(0o600)
            partial.rename(file)
        except (OSError, sqlite3.OperationalError) as error:
            partial.unlink(missing_ok=True)
            raise LedgerError(f"{file}: cannot be written ({error}); name a file where there is room") from None
        sync_folder(file.parent)
