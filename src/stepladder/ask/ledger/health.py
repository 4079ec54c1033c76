"""Whether a ledger is whole, and its backup."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepladder.ask.ledger.connection import CHUNK, Connection
from stepladder.ask.ledger.faults import damaged, network_file_system
from stepladder.ask.ledger.packing import LEAST_CHARACTERS, packed, packed_text
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
                "it from one machine only, or give --runs a folder, or [cluster] ledger a file, on a local disk"
            )
        return notes

    def compact(self) -> None:
        """Compress what older versions stored as it came, and return free space to the disk. That takes room for a copy
        of the file, and every other process has to wait. A kill loses nothing."""
        self._rewrite("attempts", "raw IS NOT NULL", "raw", "raw = NULL, body = ?", packed)
        for table, columns in (("requests", ("identity",)), ("responses", ("text", "reasoning", "logprobs"))):
            for column in columns:
                is_old = f"TYPEOF({column}) = 'text' AND LENGTH({column}) >= {LEAST_CHARACTERS}"
                self._rewrite(table, is_old, column, f"{column} = ?", packed_text)
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _rewrite(self, table: str, is_old: str, column: str, change: str, pack: Callable[[Any], str | bytes]) -> None:
        """Replace a column's old values by packed ones, some rows at a time."""
        query = f"SELECT {column}, id FROM {table} WHERE id > ? AND {is_old} ORDER BY id LIMIT {CHUNK}"  # noqa: S608
        last = -1
        while rows := self._db.execute(query, (last,)).fetchall():
            with self.transaction():
                values = [(pack(content), number) for content, number in rows]
                self._db.executemany(f"UPDATE {table} SET {change} WHERE id = ?", values)  # noqa: S608
            last = rows[-1][1]

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
