"""Decisions as they are made: appended to the file that ``[questions] reviewed`` names, and on the disk before a page
says so."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from stepladder.errors import InputError
from stepladder.mcq.reviews import Decision, Standing, read_decisions, standing

LEASE_SECONDS = 600.0
"""That an item is kept for the reviewer who looks at it."""


class Decisions:
    """A file of decisions that several processes may append to.

    Args:
        file: it is made with the first decision.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._read_at: tuple[int, int] | None = None
        self._all: list[Decision] = []
        self._standing: Mapping[str, Standing] = {}
        self.error: str | None = None
        """Why the file cannot be read, or None."""
        self._leases: dict[str, tuple[str, float]] = {}

    def append(self, decision: Decision) -> None:
        """Write a decision; it is on the disk when this returns.

        Raises:
            OSError: it cannot be written; then the file is as it was.
        """
        fields = {name: value for name, value in decision._asdict().items() if value not in (None, "", False)}
        line = f"{json.dumps(fields, ensure_ascii=False)}\n".encode()
        with self._lock, self.file.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end, is_known = file.seek(0, os.SEEK_END), _version(os.fstat(file.fileno())) == self._read_at
            try:
                whole = _line_end(self.file, end) + line
                if file.write(whole) != len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
            self._leases.pop(decision.id, None)
            if is_known:  # then it need not be read again
                self._all = [*self._all, decision]
                self._standing, self._read_at = standing(self._all), _version(os.fstat(file.fileno()))

    def all(self) -> list[Decision]:
        """Every decision, the latest last."""
        self._refresh()
        return self._all

    def standing(self) -> Mapping[str, Standing]:
        """What reviewers think, by question id."""
        self._refresh()
        return self._standing

    def _refresh(self) -> None:
        with self._lock:
            try:
                version = _version(self.file.stat())
            except OSError:
                self._read_at, self._all, self._standing = None, [], {}
                return
            if version == self._read_at:
                return
            try:
                self._all, self.error = read_decisions(self.file), None
            except InputError as error:
                self.error = str(error)
                return
            self._standing = standing(self._all)
            self._read_at = version

    def lease(self, question_id: str, reviewer: str) -> bool:
        """Keep an item for a reviewer for :data:`LEASE_SECONDS`; False where it is another one's."""
        with self._lock:
            now_seconds = time.monotonic()
            holder, until = self._leases.get(question_id, (reviewer, 0.0))
            if holder != reviewer and until > now_seconds:
                return False
            self._leases[question_id] = reviewer, now_seconds + LEASE_SECONDS
            return True

    def holder(self, question_id: str) -> str | None:
        """Who looks at an item at the moment, if anybody."""
        holder, until = self._leases.get(question_id, ("", 0.0))
        return holder if until > time.monotonic() else None


def _version(status: os.stat_result) -> tuple[int, int]:
    """What changes whenever somebody writes a file."""
    return status.st_mtime_ns, status.st_size


def _line_end(path: Path, end: int) -> bytes:
    """What ends the last line, where an editor has left it open."""
    if not end:
        return b""
    with path.open("rb") as file:
        file.seek(end - 1)
        return b"" if file.read(1) == b"\n" else b"\n"
