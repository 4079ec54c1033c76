"""``stepladder import``: multiple-choice questions of other formats as a question file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from stepladder import files, records
from stepladder.config import Cluster
from stepladder.errors import InputError, PieceError
from stepladder.mcq.formats import ImportedQuestion, SourceFormat, problems, splits_at_lines
from stepladder.nodes.chosen import workers_of
from stepladder.progress import Progress
from stepladder.records import WHOLE_FILE
from stepladder.shards import imports
from stepladder.shards.each import PIECE_BYTES, Pool
from stepladder.terminal import say
from stepladder.workspace import refuse_link, unwritable, write_atomic


def import_(source: str, out: Path, form: SourceFormat, cluster: Cluster | None, console: Console) -> None:
    """Write the questions of ``source``, a file or several, in the contest's format, read by the cores of this machine
    or of a cluster's nodes, which see ``out``'s folder by the same path.

    Raises:
        UserError: an unknown format.
        InputError: naming file, line and field.
        PieceError: a process was lost too often.
    """
    scratch = out.with_name(f".{out.name}.scratch")
    refuse_link(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
    except OSError as error:
        raise unwritable(out.parent, error) from None
    try:
        count = _import(source, out, form, Pool(workers_of(cluster), scratch, Progress(console).update))
    except PieceError:  # its log is there
        raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    say(console, f"Wrote {out}: {count:,} question{'' if count == 1 else 's'}")


def _import(source: str, out: Path, form: SourceFormat, pool: Pool) -> int:
    """Write the questions; returns their number."""
    orders = [
        {"file": str(path.absolute()), "form": form, "span": span}
        for path in files.fetched(source, pool.folder)
        for span in (records.spans(path, PIECE_BYTES) if splits_at_lines(path, form) else [WHOLE_FILE])
    ]
    pieces = pool.each("items", "questions", orders)

    def read() -> Iterator[ImportedQuestion]:
        return (item for piece in pieces for item in imports.read(piece))

    count = sum(map(imports.count, pieces))
    if not count:
        raise InputError(source, "holds no questions")
    write_atomic(out, (json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems(read)))
    return count
