"""The file of chains that somebody has already: which question each answers, and who wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from stepladder import records
from stepladder.errors import InputError


class WrittenChain(NamedTuple):
    """A chain, and the name of its writer, if the file gives one."""

    text: str
    writer: str | None


def read_chains(path: Path) -> dict[str, list[WrittenChain]]:
    """Read a file with lines ``{"id", "chain"}`` and optionally ``"model"``, the writer's name.

    Returns:
        The chains by question id, in the order of the file.

    Raises:
        InputError: naming file, line and field.
    """
    chains: dict[str, list[WrittenChain]] = {}
    for number, row in records.parse_lines(path):
        if not isinstance(row, dict):
            raise InputError(path, 'is not an object {"id", "chain"}', line=number)
        for field in ("id", "chain", "model") if "model" in row else ("id", "chain"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise InputError(path, "must be a text that is not empty", line=number, field=field)
        chains.setdefault(row["id"], []).append(WrittenChain(row["chain"], row.get("model")))
    if not chains:
        raise InputError(path, 'holds no chains; one JSON object {"id", "chain"} a line is expected')
    return chains
