"""Rows of a Parquet file, read by a process with a limit on memory: kilobytes may unpack to gigabytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.errors import InputError, MissingExtra
from stepladder.records import MAX_LINE_BYTES, MAX_TEXT_BYTES

WORKER = Path(__file__).with_name("parquet_worker.py")


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of every row, from 1; values that JSON does not have as text.

    Raises:
        MissingExtra: pyarrow is not installed.
        InputError: the file cannot be read, is no Parquet, or unpacks to more than a text file may have.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow (to read Parquet)")
    too_large = InputError(
        path,
        f"unpacks to more than {MAX_LINE_BYTES:,} bytes in a row or {MAX_TEXT_BYTES:,} in all; split it, or convert it "
        "to JSONL",
    )
    # -I: nothing is imported from the working directory. No environment, so that the child does not see API keys.
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", str(WORKER), str(path.absolute())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"ARROW_DEFAULT_MEMORY_POOL": "system"},
    ) as child:
        assert child.stdout is not None  # noqa: S101 (both are pipes)
        assert child.stderr is not None  # noqa: S101
        try:
            size = 0
            for number, line in enumerate(iter(lambda: child.stdout.readline(MAX_LINE_BYTES + 1), b""), start=1):  # type: ignore[union-attr]
                size += len(line)
                if len(line) > MAX_LINE_BYTES or size > MAX_TEXT_BYTES:
                    raise too_large
                if not line.endswith(b"\n"):  # it ended in the middle
                    break
                yield number, json.loads(line)
            error_text = child.stderr.read(10_000).decode(errors="replace").strip()
            code = child.wait()
        finally:
            child.kill()
    if code == 2:
        raise InputError(path, f"not Parquet ({' '.join(error_text.split())[:300]})")
    if code != 0:
        raise too_large
