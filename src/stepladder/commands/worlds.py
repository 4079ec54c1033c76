"""``stepladder worlds``: closed-world problems whose answers are proved, as a question file."""

from __future__ import annotations

from pathlib import Path

from stepladder.closedworld.generate import generate, to_line
from stepladder.errors import UserError
from stepladder.workspace import write_atomic


def worlds(out: Path, problems: int, seed: int, language: str, split: str) -> None:
    """Write ``problems`` problems; the same seed gives the same bytes.

    Raises:
        UserError: the language or the split is unknown, or the file cannot be written.
    """
    if not out.parent.is_dir():  # said now, not after minutes of proving
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name a file in another one")
    write_atomic(out, "".join(to_line(record) for record in generate(seed, problems, language, split)))
