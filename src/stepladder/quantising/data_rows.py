"""Rows of a data file of general text: Parquet, JSONL or one JSON array. Nothing in it is executed, and only its
beginning is read, since such a file may hold millions of rows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder import records
from stepladder.errors import InputError
from stepladder.isolation import parquet

MAX_ROWS = 20_000
CHUNK_CHARACTERS = 1_000_000
"""Of an array, read at once."""
BETWEEN_ROWS = re.compile(r"[\s,]*")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The first :data:`MAX_ROWS` rows with their numbers, from 1 (in JSONL the line's).

    Raises:
        InputError: the file cannot be read as any of the three.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        numbered: Iterator[tuple[int, Any]] = parquet.rows(path)
    elif _is_array(path):
        numbered = enumerate(_array(path), start=1)
    else:
        numbered = records.parse_lines(path)
    return itertools.islice(numbered, MAX_ROWS)


def _is_array(path: Path) -> bool:
    """Whether the first character that is no space is a bracket."""
    try:
        with path.open("rb") as file:
            return file.read(CHUNK_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError:
        return False  # which is said by who reads it


def _array(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, decoded one by one as the file is read."""
    decoder, number, position = json.JSONDecoder(), 1, 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(CHUNK_CHARACTERS).lstrip()[1:]  # without the bracket
            while True:
                if (between := BETWEEN_ROWS.match(text, position)) is not None:  # always: it matches nothing, too
                    position = between.end()
                if text[position : position + 1] == "]":
                    return
                try:
                    element, end = decoder.raw_decode(text, position)
                    is_whole = end < len(text)  # a number at the very end may go on
                except json.JSONDecodeError:
                    is_whole = False
                if is_whole:
                    yield element
                    number, position = number + 1, end
                    continue
                left = len(text) - position
                if left > records.MAX_LINE_BYTES or not (chunk := file.read(max(CHUNK_CHARACTERS, left))):
                    break
                text, position = text[position:] + chunk, 0
    except (ValueError, RecursionError) as error:  # no UTF-8; a number of thousands of digits; nested too deeply
        raise InputError(path, f"cannot be read as JSON ({error}), row {number}") from None
    raise InputError(path, f"not JSON, or more than {records.MAX_LINE_BYTES:,} characters, at row {number}")
