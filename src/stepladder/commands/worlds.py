"""``stepladder worlds``: generate closed-world problems whose answers are proved, as a question file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepladder.closedworld.generate import FAMILIES, generate, to_line
from stepladder.errors import UserError
from stepladder.workspace import write_atomic


def worlds(out: Path, problems: int, seed: int, language: str, split: str, families: Sequence[str]) -> None:
    """Write ``problems`` problems of the named families, in turn; of all families where none is named. The same
    arguments give the same bytes.

    Raises:
        UserError: the language, the split or a family is unknown, or the file cannot be written.
    """
    if not out.parent.is_dir():  # before minutes of proving
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name a file in another one")
    chosen = tuple(dict.fromkeys(families)) or tuple(FAMILIES)
    write_atomic(out, "".join(to_line(record) for record in generate(seed, problems, language, split, chosen)))
