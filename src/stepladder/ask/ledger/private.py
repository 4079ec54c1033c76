"""A ledger holds questions, answers and what servers said: it is for its owner alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

OWNER_ONLY = 0o600
OTHERS = 0o077
"""Permissions of everybody but the owner."""


def make_private(path: Path) -> None:
    """Create a ledger's file, where there is none, for its owner alone; take the permissions of others away from one
    that is there, and from SQLite's files beside it, which get the permissions of the ledger's when they are made."""
    with contextlib.suppress(OSError):  # it is there; or it cannot be made, as SQLite will say
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, OWNER_ONLY))
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        with contextlib.suppress(OSError):  # not there, or another user's
            mode = file.stat().st_mode & 0o777
            if mode & OTHERS and file.is_file():
                file.chmod(mode & ~OTHERS)
