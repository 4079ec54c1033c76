"""What can be done on any node: ``python -m stepladder.shards.work FUNCTION ORDER RESULT FOLDER``, where FOLDER is what
relative paths in the order start from.

A message for the user is the last line of what it writes, and its exit code that of :class:`UserError`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepladder.errors import UserError
from stepladder.shards import imports, near, proofs, splits
from stepladder.workspace import unwritable

FUNCTIONS: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = {
    "shared": near.shared,
    "shared_texts": near.shared_texts,
    "pairs": near.pairs,
    "splits": splits.splits,
    "proofs": proofs.proofs,
    "items": imports.items,
}
"""By name. Each is given an order and an empty folder for its result."""


def perform(function: str, order: Mapping[str, Any], result: Path) -> None:
    """Make the result of an order, unless another process makes it first.

    Raises:
        UserError: the order names a file with an error, or the result cannot be written.
    """
    partial = result.with_name(f".{result.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir()
        FUNCTIONS[function](order, partial)
        if not result.exists():
            partial.replace(result)
    except OSError as error:
        if not result.exists():
            raise unwritable(result.parent, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    function, order, result, folder = sys.argv[1:]
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        perform(function, json.loads(Path(order).read_text(encoding="utf-8")), Path(result))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
