"""Waiting for a ledger that cannot be written at the moment, so that answers that are paid for are not lost."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from stepladder.ask.ledger.faults import explain, passes, room_bytes
from stepladder.errors import LedgerError

MIN_ROOM_BYTES = 4 * 2**20
"""Below this, nothing new is begun: what is left is for the answers of requests that were sent."""
POLL_SECONDS = 1.0
"""Between two tries to write."""
WAIT_SECONDS = 600.0
"""From the first failure; then the writes that wait are given up."""


class Patience:
    """How long writes to a ledger have failed.

    Args:
        path: the ledger.
        note: called with one line when the waiting begins, and one when it is over.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path, self._note = path, note
        self._since: float | None = None
        self._is_over = False

    @property
    def has_room(self) -> bool:
        """Whether there is room to begin something new."""
        return room_bytes(self._path) >= MIN_ROOM_BYTES

    def pause(self, error: sqlite3.Error | None, answers: int) -> float:
        """Seconds to wait before the next try. Says once what is waited for, and until when.

        Args:
            error: why the write failed; None: it was not tried, since there is too little room.
            answers: how many answers wait in memory.

        Raises:
            LedgerError: the ledger is damaged, or has not been writable for WAIT_SECONDS.
            sqlite3.Error: the error is a bug.
        """
        reason = self._reason(error)
        if error is not None and not passes(error):
            raise reason from error
        now_seconds = time.monotonic()
        if self._since is None:
            self._since = now_seconds
            waiting = f"{answers} answers wait in memory, up to {WAIT_SECONDS / 60:.0f} min"
            self._note(f"{reason}. Nothing more is begun; {waiting}")
        elif self._is_over or now_seconds - self._since >= WAIT_SECONDS:
            lost = f"; {answers} answers that waited in memory are lost and stay charged" if answers else ""
            raise LedgerError(f"{reason}. Given up after {(now_seconds - self._since) / 60:.0f} min{lost}") from error
        return POLL_SECONDS

    @property
    def is_waiting(self) -> bool:
        """Whether the last write failed."""
        return self._since is not None

    def give_up(self) -> None:
        """Wait no longer: the next failure is the last."""
        self._is_over = True

    def end(self) -> None:
        """A write has succeeded."""
        if self._since is not None:
            self._since = None
            self._note(f"{self._path}: can be written again, nothing was lost; going on")

    def _reason(self, error: sqlite3.Error | None) -> LedgerError:
        if error is None:
            return LedgerError(
                f"{self._path}: the disk is nearly full ({room_bytes(self._path) / 2**20:,.1f} MiB left for it, "
                f"{MIN_ROOM_BYTES / 2**20:,.1f} needed); free some space"
            )
        explained = explain(self._path, error)
        if explained is None:
            raise error
        return explained
