"""Files by what a user calls them: a path, a pattern that several files match, or an address in an object store.

Everything else works on files of this machine: what is somewhere else, or compressed, is copied first, and what is
written goes to its place once it is whole. Object stores are reached through fsspec, whose drivers find keys where the
stores' own tools do (environment variables, files of credentials).
"""

from __future__ import annotations

import contextlib
import glob
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from stepladder.errors import InputError, MissingExtra, UserError
from stepladder.workspace import digest, file_digest, unwritable

STORES = ("s3", "gs", "abfs", "hdfs", "https")
"""Protocols of addresses, as fsspec calls them."""
READ_BYTES = 4096
"""Of compressed data at once, which may grow ten thousandfold."""
COPY_BYTES = 2**22
OUTBOX = Path("stepladder-outbox")
"""Folder, in the working directory, of what is to go to addresses."""
MAX_GROWTH = 1000
"""How many times as large as itself a compressed file may become."""
_ADDRESS = re.compile(r"(\w+)://")
_PATTERN = re.compile(r"[*?\[]")


def is_address(name: str) -> bool:
    """Whether it is an address, and no path."""
    return _ADDRESS.match(name) is not None


def beside(folder: Path, name: str) -> str:
    """The path that a name stands for in a file in ``folder``; addresses are what they are."""
    if is_address(name):
        return name
    return str(Path(glob.escape(str(folder))) / name) if _is_pattern(folder / name, name) else str(folder / name)


def _is_pattern(path: Path, name: str) -> bool:
    """Whether a name is a pattern, and not that of a file that is called like one."""
    return _PATTERN.search(name) is not None and not path.exists()


def listed(name: str) -> list[str]:
    """The paths or addresses of the files of a name, sorted.

    Raises:
        InputError: there is none, or its store cannot be reached.
    """
    if is_address(name):
        with _reached(name) as (store, path):
            found = (
                [store.unstrip_protocol(path) for path in sorted(store.glob(path))] if _PATTERN.search(path) else [name]
            )
    else:
        found = sorted(glob.glob(name)) if _is_pattern(Path(name), name) else [name]  # noqa: PTH207  # any folder
        for path in found:
            if not Path(path).is_file():
                raise InputError(path, "no such file; check its path")
    if not found:
        raise InputError(name, "no file matches; check the pattern")
    return found


def version(name: str) -> str:
    """A digest that changes whenever the files of a name, or their content, do.

    Raises:
        InputError: there is none, or its store cannot be reached.
    """
    found = listed(name)
    if is_address(name):
        with _reached(name) as (store, _):
            versions = [_changes_with(store.info(file)) for file in found]
    else:
        versions = [file_digest(Path(file)) for file in found]
        if found == [name]:
            return versions[0]
    return digest([[_base_name(file), version] for file, version in zip(found, versions, strict=True)])


def fetched(name: str, folder: Path) -> list[Path]:
    """The files of a name as files of this machine, in the order of their names. What is somewhere else or compressed
    is copied into ``folder``, unless it is there already.

    Raises:
        InputError: there is none, two have the same name, or one cannot be read.
    """
    local: dict[str, Path] = {}
    for file in listed(name):
        base_name, decompressor = _base_name(file), DECOMPRESSORS.get(PurePosixPath(file).suffix)
        if base_name in local:
            raise InputError(name, f"two files are called {base_name}; give them names of their own")
        copy = folder / base_name
        if not is_address(file) and decompressor is None:
            copy = Path(file)
        elif not copy.exists():
            _copy(file, copy, decompressor)
        local[base_name] = copy
    return [*local.values()]


def _base_name(name: str) -> str:
    """A file's own name, of what is in it where it is compressed."""
    path = PurePosixPath(name)
    return path.stem if path.suffix in DECOMPRESSORS else path.name


@contextlib.contextmanager
def read(name: str) -> Iterator[Path]:
    """A single file as a file of this machine, while the block lasts.

    Raises:
        InputError: the name stands for no file or several, or it cannot be read.
    """
    if not is_address(name) and PurePosixPath(name).suffix not in DECOMPRESSORS:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = fetched(name, Path(folder))
        if len(paths) > 1:
            raise InputError(name, f"stands for {len(paths)} files; name one of them")
        yield paths[0]


@contextlib.contextmanager
def written(name: str) -> Iterator[Path]:
    """A path to write a file or a folder to. Where the name is an address, it is a path in :data:`OUTBOX`, which is
    copied to that address when the block ends without an error, and stays there.

    Raises:
        UserError: the address cannot be written.
    """
    if not is_address(name):
        yield Path(name)
        return
    local = OUTBOX / PurePosixPath(name).name
    with _reached(name):  # before any work is done for it
        OUTBOX.mkdir(exist_ok=True)
    yield local
    with _reached(name, "written") as (store, path):
        store.put(str(local), path, recursive=local.is_dir())


def _changes_with(info: Mapping[str, Any]) -> str:
    """What a store says about a file that changes with its content."""
    known = {key.lower().replace("_", ""): value for key, value in info.items()}
    version = next((known[key] for key in ("etag", "md5hash", "lastmodified", "mtime") if known.get(key)), None)
    return digest([known.get("size"), str(version)])


@contextlib.contextmanager
def _reached(name: str, done: str = "read") -> Iterator[tuple[Any, str]]:
    """The store of an address, and the path in it."""
    if name.partition("://")[0] not in STORES:
        raise InputError(name, f"its protocol is not known; use one of {', '.join(STORES)}, or a path")
    if "::" in name:
        raise InputError(name, "holds '::', by which fsspec would reach other files; write one address")
    if "@" in name.partition("://")[2].partition("/")[0]:
        raise InputError(f"{name.partition('://')[0]}://***", "holds a user name or password; keys are found elsewhere")
    try:
        import fsspec
    except ImportError:
        raise MissingExtra("fsspec", "'stepladder[files]'") from None
    try:
        yield fsspec.core.url_to_fs(name, skip_instance_cache=True)  # whose listing would be of earlier
    except UserError:
        raise
    except ImportError as error:
        raise InputError(name, f"cannot be {done}: {error}") from None
    except Exception as error:  # noqa: BLE001  # every store has errors of its own
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(name, f"cannot be {done} ({said[0][:200]})") from None


class Decompressor(Protocol):
    """Of one frame of compressed data."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""

    @property
    def unused_data(self) -> bytes:
        """What came after its end."""

    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> Decompressor:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("zstandard", "'stepladder[files]'") from None
    decompressor: Decompressor = zstandard.ZstdDecompressor().decompressobj()
    return decompressor


def _gzip() -> Decompressor:
    return zlib.decompressobj(wbits=31)


DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {".gz": _gzip, ".zst": _zstd}
"""By the suffix of a file's name."""


def _copy(name: str, copy: Path, decompressor: Callable[[], Decompressor] | None) -> None:
    """Copy a file from anywhere, decompressed."""
    partial = copy.with_name(f".{copy.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            source: BinaryIO
            if is_address(name):
                store, path = stack.enter_context(_reached(name))
                source = stack.enter_context(store.open(path, "rb"))
            else:
                source = stack.enter_context(Path(name).open("rb"))
            with partial.open("xb") as target:
                if decompressor is None:
                    shutil.copyfileobj(source, target, COPY_BYTES)
                else:
                    target.writelines(_decompressed(name, source, decompressor))
    except OSError as error:
        raise unwritable(partial, error) from None
    partial.replace(copy)


def _decompressed(name: str, source: BinaryIO, decompressor: Callable[[], Decompressor]) -> Iterator[bytes]:
    frame, read, grown, has_begun = decompressor(), 0, 0, False
    while data := source.read(READ_BYTES):
        read += len(data)
        while data:
            try:
                piece = frame.decompress(data)
            except Exception as error:  # noqa: BLE001  # each library has errors of its own
                raise InputError(name, f"cannot be decompressed ({error})") from None
            grown += len(piece)
            if grown > MAX_GROWTH * max(read, READ_BYTES):
                raise InputError(name, f"becomes more than {MAX_GROWTH:,} times as large; decompress it yourself")
            yield piece
            data, has_begun = (frame.unused_data, False) if frame.eof else (b"", True)
            frame = decompressor() if frame.eof else frame
    if has_begun:
        raise InputError(name, "cannot be decompressed (it ends before its data does)")
