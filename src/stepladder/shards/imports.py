"""The questions of a piece of a file in another format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepladder.mcq.formats import Columns, ImportedQuestion, SourceFormat, converted
from stepladder.records import Span, parse_lines

ITEMS = "items.jsonl"
"""File of a result."""


def items(order: Mapping[str, Any], result: Path) -> None:
    """The questions in lines ``span`` of ``file``, which is in ``form``."""
    columns, name = order["form"]
    found = converted(Path(order["file"]), SourceFormat(Columns(*columns), name), Span(*order["span"]))
    with (result / ITEMS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in found)


def count(result: Path) -> int:
    """How many questions are in a result."""
    with (result / ITEMS).open("rb") as file:
        return sum(1 for _ in file)


def read(result: Path) -> Iterator[ImportedQuestion]:
    """The questions in a result."""
    return (ImportedQuestion(*fields) for _, fields in parse_lines(result / ITEMS))
