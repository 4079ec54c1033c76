"""The run folder: which artifacts are done, stale or missing, and writing them so that a kill leaves no half of one.

An artifact is a folder ``runs/<name>/<stage>[/<part>]``. It is built in a hidden folder beside it, its
``manifest.json`` written last, and then renamed into place. A folder without a manifest counts as missing. The
fingerprint in the manifest covers the settings and the digests of everything the stage read; while it matches, the
artifact is up to date.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from stepladder.errors import UserError

MANIFEST = "manifest.json"
RUNS = Path("runs")
"""Folder of all runs, unless the user names another."""
PROBE_SECONDS, PROBE_POLL_SECONDS = 0.2, 0.01
"""How long those who only look whether a lock is held (:func:`is_held`) may be in the way of who takes it."""
State = Literal["done", "stale", "missing"]


class FileEntry(TypedDict):
    bytes: int
    sha256: str


class Manifest(TypedDict):
    """What an artifact was made from, and its files by name."""

    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: dict[str, FileEntry]
    seconds: float
    dtype: NotRequired[str]
    """The number format that was computed in."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, without comparing it with the files.

    Raises:
        OSError, ValueError: it is missing, or no JSON.
    """
    return cast(Manifest, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, non-ASCII kept. Equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_itself(path: Path, flags: int) -> int:
    """Open a file of ours, never what a link in its place leads to, and never for child processes.

    Raises:
        OSError: it cannot be opened; ELOOP: it is a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def is_held(lock: Path) -> bool:
    """Whether some process holds a lock file of ours (``flock``)."""
    try:
        handle = open_itself(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _take(handle: int) -> None:
    """Lock a file for this process.

    Raises:
        BlockingIOError: another process holds it, and not only to look.
        OSError: it cannot be locked.
    """
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PROBE_POLL_SECONDS)
        else:
            return


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside ``out``, which it becomes when the block ends; if the block raises, nothing is left.

    Raises:
        UserError: ``out`` is there already, or its parent is not.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; name another folder, or move it away")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name another one")
    partial = out.with_name(f".{out.name}.partial")
    refuse_link(partial)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: after a rename, so that it survives a loss of power."""
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file, whole or piece by piece, so that readers see the old content or the new, never a part.

    A temporary file that a killed writer leaves is overwritten by the next. The caller must keep two writers of one
    file apart, as the lock of a run does.

    Raises:
        UserError: the folder is missing or cannot be written, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a link goes, and not what it leads to
        handle = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); {_remedy(error)}") from None


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a place below the folder of all runs that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror}); free some space, or use another --runs")


def refuse_link(path: Path) -> None:
    """Refuse a link in the place of a folder of ours, since what is written or deleted there would be somewhere else.

    Raises:
        UserError: it is one.
    """
    if path.is_symlink():
        raise UserError(f"{path}: is a link; remove it, since nothing is written to where it leads")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space, or raise the limit, and run again"
    return "name a folder you can write to"


@dataclass(frozen=True)
class Artifact:
    """One folder of a run and what it is made from."""

    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Digest of everything it reads, by name."""

    @property
    def fingerprint(self) -> str:
        return digest({"settings": self.settings, "inputs": self.inputs})

    def manifest(self) -> Manifest | None:
        """The manifest; None while the artifact is not complete (a listed file is missing or has another size)."""
        try:
            manifest = read_manifest(self.folder)
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["files"]}
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
            return None
        return manifest if all(sizes[name] == entry["bytes"] for name, entry in manifest["files"].items()) else None

    def state(self) -> State:
        manifest = self.manifest()
        if manifest is None:
            return "missing"
        return "done" if manifest["fingerprint"] == self.fingerprint and not self.edited() else "stale"

    def edited(self) -> list[str]:
        """Names of the files that are not as they were made.

        The manifest was written last, so a file that has not changed since is as it was; of any other the digest is
        compared. If all are right (the folder was copied), the manifest's time is set to now, which saves doing it
        again. An edit within the same few milliseconds of the manifest is not noticed.
        """
        if (manifest := self.manifest()) is None:
            return []
        made_ns = (self.folder / MANIFEST).stat().st_ctime_ns
        later = [name for name in manifest["files"] if (self.folder / name).stat().st_ctime_ns > made_ns]
        names = [name for name in later if file_digest(self.folder / name) != manifest["files"][name]["sha256"]]
        if later and not names:
            with contextlib.suppress(OSError):  # a folder of somebody else
                os.utime(self.folder / MANIFEST)
        return names

    def digest(self, run: str = "stepladder run") -> str:
        """Digest of the finished files, for the inputs of a later stage. ``run`` is the command that makes them.

        Raises:
            UserError: the artifact is not there yet.
        """
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"{self.folder}: not there yet; run the stages before this one ('{run}')")
        if edited := self.edited():
            raise UserError(f"{self.folder}: {edited[0]} was changed since it was made; '{run}' makes it again")
        return digest({name: entry["sha256"] for name, entry in manifest["files"].items()})

    def scratch(self, dtype: str | None = None) -> Path:
        """A folder for what a build that was killed continues from. It is deleted once the artifact is finished, and
        emptied when the artifact is made from something else or in another number format."""
        folder = self._scratch
        refuse_link(folder)
        file, made_from = folder / "fingerprint", f"{self.fingerprint} in {dtype}"
        if not file.exists() or file.read_text(encoding="utf-8") != made_from:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_atomic(file, made_from)
        return folder

    @property
    def _scratch(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.scratch")

    @contextlib.contextmanager
    def writing(self, dtype: str | None = None) -> Iterator[Path]:
        """Yield an empty folder to write into; on success it replaces the artifact, on failure it is deleted.

        ``dtype``, the number format that is computed in, is recorded in the manifest but not in the fingerprint.
        """
        partial = self.folder.with_name(f".{self.folder.name}.partial")
        for folder in (partial, self.folder):
            refuse_link(folder)
        shutil.rmtree(partial, ignore_errors=True)
        start = time.monotonic()
        try:
            partial.mkdir(parents=True)
            yield partial
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest: Manifest = {
                "fingerprint": self.fingerprint,
                "settings": self.settings,
                "inputs": self.inputs,
                "files": {
                    path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                    for path in files
                },
                "seconds": round(time.monotonic() - start, 1),
            }
            if dtype is not None:
                manifest["dtype"] = dtype
            write_atomic(partial / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
            if self.folder.exists():
                shutil.rmtree(self.folder)
            partial.rename(self.folder)
            sync_folder(self.folder.parent)
            shutil.rmtree(self._scratch, ignore_errors=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise UserError(f"{self.folder}: cannot be written ({error.strerror}); {_remedy(error)}") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Workspace:
    """``runs/<name>``: the folder of the run's artifacts, with the ledger of all runs beside it or elsewhere."""

    runs: Path
    name: str
    ledger_file: Path | None = None

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def ledger(self) -> Path:
        return self.ledger_file or self.runs / "ledger.sqlite"

    @property
    def heartbeat(self) -> Path:
        """File that says how far the command that works on the run is."""
        return self.folder / ".heartbeat.json"

    @property
    def _lock(self) -> Path:
        return self.folder / ".lock"

    def is_locked(self) -> bool:
        """Whether some process works on the run."""
        return is_held(self._lock)

    def path(self, stage: str, part: str | None = None) -> Path:
        return self.folder / stage if part is None else self.folder / stage / part

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process.

        Raises:
            UserError: another process works on this run, or its folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror}); give --runs another folder") from None
        lock = self._lock
        try:
            handle = open_itself(lock, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise UserError(f"{lock}: cannot be opened ({reason}); remove it, or make it writable") from None
        try:
            try:
                _take(handle)
            except BlockingIOError:
                raise UserError(
                    f"{self.folder}: another stepladder process is working on this run; wait for it to end"
                ) from None
            except OSError as error:
                raise UserError(
                    f"{lock}: cannot be locked ({error.strerror}); give --runs a folder on a local disk"
                ) from None
            yield
        finally:
            os.close(handle)
