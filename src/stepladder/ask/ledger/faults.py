"""What SQLite's error codes mean for a ledger, and what to do: busy, read-only, full and damaged are different things.

https://sqlite.org/rescode.html lists the codes. Only of a file that is no ledger a message says that it may go: caps
and answers are in the file, so a live or a read-only one must stay where it is.
"""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
from pathlib import Path
from typing import TypeGuard

import psutil

from stepladder.errors import LedgerError

BUSY_SECONDS = 60.0
"""That a statement waits for the lock of another process."""
NETWORK_FILE_SYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "smb3", "smbfs",
}  # fmt: skip
"""Types as the operating system lists its mounts; on these, locks between machines are often missing or late."""
_PASSING = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_DETACHED = {sqlite3.SQLITE_READONLY_DBMOVED}


def passes(error: Exception) -> TypeGuard[sqlite3.Error]:
    """Whether the same statement may succeed later: the file is busy, full or not writable, and not damaged."""
    return isinstance(error, sqlite3.Error) and _primary(error) in _PASSING


def explain(path: Path, error: sqlite3.Error) -> LedgerError | None:
    """The error as one line with advice; None for an error that is not the file's, but a bug."""
    code = _primary(error)
    if code not in _PASSING | _DAMAGED:
        return None
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        advice = f"{_no_room(path, error)} (what is stored is intact, and the same command goes on from there)"
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        advice = (
            f"another process has kept it locked for {BUSY_SECONDS:.0f} s; it is intact: leave it where it is, and "
            "wait for that process or end it"
        )
    elif _code(error) in _DETACHED:
        advice = "was moved or deleted while this process used it; put it back where it was and run again"
    elif code == sqlite3.SQLITE_READONLY:
        advice = (
            "cannot be written (the file, its folder or the file system is read-only); it is intact: leave it where it "
            "is and make it and its folder writable, or copy the whole runs folder to a place you can write to"
        )
    elif code == sqlite3.SQLITE_CANTOPEN:
        advice = f"cannot be opened ({_why_not_opened(path, error)}); choose a folder you can write to"
    elif code == sqlite3.SQLITE_CORRUPT:
        return damaged(path, str(error))
    else:
        advice = (
            f"not a usable ledger ({error}); if it once was one, restore its last backup; otherwise move it away to "
            "start a new one"
        )
    return LedgerError(f"{path}: {advice}{_network_hint(path)}")


def damaged(path: Path, what: str) -> LedgerError:
    """The error for a ledger whose content is not what was written. ``what`` says what was found."""
    return LedgerError(
        f"{path}: damaged ({' '.join(what.split())}); keep the file: put a backup in its place (stepladder ledger "
        f"--backup makes them), or recover what can be read with 'sqlite3 {path} .recover'{_network_hint(path)}"
    )


def room_bytes(path: Path) -> int:
    """Bytes that the ledger may still grow by: free space of its disk, or less with a limit on the size of files."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return free
    files = [path.with_name(f"{path.name}{suffix}") for suffix in ("", "-wal")]
    return min(free, limit - max((file.stat().st_size for file in files if file.exists()), default=0))


def network_file_system(path: Path) -> str | None:
    """The type of the file system that a path is on, if it is one over a network; otherwise None."""
    place = path.absolute().resolve()
    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, RuntimeError):  # no list of mounts in this container
        return None
    around = [mount for mount in mounts if place.is_relative_to(mount.mountpoint)]
    nearest = max(around, key=lambda mount: len(Path(mount.mountpoint).parts), default=None)
    return nearest.fstype if nearest is not None and nearest.fstype.lower() in NETWORK_FILE_SYSTEMS else None


def _no_room(path: Path, error: sqlite3.Error) -> str:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        return f"cannot grow ({error}; the limit on a file's size is {limit:,} bytes); raise it (ulimit -f)"
    if _primary(error) == sqlite3.SQLITE_FULL:
        return f"the disk is full ({room_bytes(path) / 2**20:,.1f} MiB free); free some space"
    return f"the disk refuses to write or read ({error}); check its space, quota and health"


def _why_not_opened(path: Path, error: sqlite3.Error) -> str:
    if path.is_dir():
        return "it is a folder"
    if path.exists() and not os.access(path, os.R_OK):
        return "no permission to read it"
    return str(error)


def _network_hint(path: Path) -> str:
    kind = network_file_system(path)
    return (
        "" if kind is None else f" (it lies on a network file system, {kind}, where locks may fail: use a local disk)"
    )


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", None) or 0


def _primary(error: sqlite3.Error) -> int:
    """The code without its extension."""
    return _code(error) & 0xFF
