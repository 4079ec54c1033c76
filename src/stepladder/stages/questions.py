"""questions: the user's files as one record per sub-question, split by problem, with an audit of the input.

Files may hold millions of problems, so they are streamed. Training problems are read once for their ids, from which the
validation split is drawn, once to be compared with the test, if there is one, and once to be repaired, audited and
written. The last two are done piece by piece, in as many processes as there are cores, here or on the nodes of a
cluster. Only an id and a digest of each problem are kept in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple, get_args

from stepladder import files, records
from stepladder.config import Config, Questions
from stepladder.context import Context
from stepladder.documents import Oddity, QuestionAudit
from stepladder.errors import InputError, PieceError, UserError
from stepladder.mcq.audit import Audit
from stepladder.mcq.overlap import problem_text
from stepladder.mcq.questionfile import rows, stream_problems
from stepladder.mcq.reviews import read_reviews
from stepladder.mcq.shuffle import rng
from stepladder.nodes.chosen import workers_of
from stepladder.records import Span, Split
from stepladder.shards import splits
from stepladder.shards.each import PIECE_BYTES, Pool
from stepladder.shards.twins import near_held_out
from stepladder.workspace import Artifact, unwritable, write_atomic


class Lines(NamedTuple):
    """Whole lines of a question file, which one process works on."""

    file: Path
    span: Span
    is_test: bool


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {"train": files.version(config.questions.train)}
    if config.questions.test is not None:
        inputs["test"] = files.version(config.questions.test)
    if config.questions.reviewed is not None:
        inputs["reviewed"] = files.version(str(config.questions.reviewed))
    settings = {"language": config.language, "seed": config.seed, "validation": config.questions.validation}
    return Artifact(context.input("questions"), settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    scratch = artifact(context, part).scratch()
    try:
        _build(context, folder, Pool(workers_of(context.config.cluster), scratch, context.progress.update))
    except PieceError:  # what is done is kept, and so is the log
        raise
    except UserError:  # the files will be others
        shutil.rmtree(scratch)
        raise


def _build(context: Context, folder: Path, pool: Pool) -> None:
    config = context.config
    train, test = (_fetched(config.questions, split, pool.folder / split) for split in ("train", "test"))
    held_out = _held_out(config, train)
    reviewed = config.questions.reviewed
    reviews, stale = read_reviews(reviewed, train, config.language) if reviewed is not None else ({}, {})
    choices = pool.folder / "choices.json"
    write_atomic(choices, json.dumps({"held_out": sorted(held_out), "reviews": reviews}))
    lines = [
        Lines(file, span, is_test)
        for is_test, paths in ((False, train), (True, test))
        for file in paths
        for span in records.spans(file, PIECE_BYTES)
    ]
    audit = Audit()
    audit.others.add(_stale(reviewed, stale))
    audit.others.add(_twins(config, pool, [piece for piece in lines if not piece.is_test], test))
    _write(folder, config, pool, choices, lines, audit)
    audit.document(Counter(review.action for review in reviews.values())).write(folder)
    if counts := audit.counts():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        context.progress.say(f"odd in the input: {kinds}; see {context.input('questions') / QuestionAudit.FILE}")


def _stale(reviewed: Path | None, lines: Mapping[str, int]) -> Iterator[Oddity]:
    """Decisions that do not hold any more."""
    for name, line in lines.items():
        message = f"{name} had another text, options or label when it was decided about; decide again"
        yield Oddity(
            kind="decision about another question", file=str(reviewed and reviewed.name), line=line, message=message
        )


def _fetched(questions: Questions, split: str, folder: Path) -> list[Path]:
    """The files of a split on this machine; none without a test."""
    name = questions.train if split == "train" else questions.test
    if name is None:
        return []
    folder.mkdir(exist_ok=True)
    return files.fetched(name, folder)


def _held_out(config: Config, train: Sequence[Path]) -> set[str]:
    """The first pass over the training problems: ids of those held out for validation."""
    ids = _ids(train)
    if len(ids) < 2:
        reason = "holds one problem; at least two are needed, one to train on and one for validation"
        raise InputError(config.questions.train, reason)
    return set(validation_ids([*ids], config.questions.validation, config.seed))


def _ids(paths: Sequence[Path]) -> dict[str, Path]:
    """The file of each problem in some files, by the problem's id.

    Raises:
        InputError: an id is used twice.
    """
    found: dict[str, Path] = {}
    for file in paths:
        for number, row in rows(file):
            _add_id(found, row["id"], file, number)
    return found


def _add_id(found: dict[str, Path], name: str, file: Path, line: int) -> None:
    """Add a problem's id to those found before.

    Raises:
        InputError: it is one of them.
    """
    if name in found:
        reason = f"id {name!r} was used in {found[name].name}; ids must be unique"
        raise InputError(file, reason, line=line, field="id")
    found[name] = file


def validation_ids(problems: list[str], share: float, seed: int) -> list[str]:
    """The problems held out for validation: at least one, and never all."""
    if len(problems) < 2:
        return []
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    return rng("validation", seed).sample(sorted(problems), count)


def _twins(config: Config, pool: Pool, train: Sequence[Lines], test: Sequence[Path]) -> Iterator[Oddity]:
    """Training problems that are in the test in nearly the same words; the trainset leaves them out."""
    by_id = dict[str, Path]()
    orders = [{"file": str(lines.file), "language": config.language, "span": lines.span} for lines in train]
    found = near_held_out(pool, _texts(config, test, by_id), "shared", orders)
    test_ids = [*by_id]
    for twin in found:
        message = f"{twin.id} is nearly {test_ids[twin.held_out]} of the test (similarity {twin.similarity:.2f})"
        file = train[twin.piece].file.name
        yield Oddity(kind="near-duplicate of a test problem", file=file, line=twin.line, message=message)


def _texts(config: Config, test: Sequence[Path], by_id: dict[str, Path]) -> Iterator[str]:
    """The whole text of each problem of the test; its file is added to ``by_id``."""
    for file in test:
        for problem in stream_problems(file, config.language, labelled=False):
            _add_id(by_id, problem.id, file, problem.line)
            yield problem_text(problem.questions)


def _write(folder: Path, config: Config, pool: Pool, choices: Path, lines: Sequence[Lines], audit: Audit) -> None:
    """Repair, audit and write the questions of all files.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    common = {"language": config.language, "choices": str(choices.absolute())}
    orders = [{**common, "file": str(file), "labelled": not is_test, "span": span} for file, span, is_test in lines]
    results = pool.each("splits", "questions", orders)
    by_file = groupby(zip(lines, results, strict=True), key=lambda pair: (pair[0].is_test, pair[0].file))
    try:
        with ExitStack() as stack:
            written = {name: stack.enter_context((folder / f"{name}.jsonl").open("wb")) for name in get_args(Split)}
            for (_, file), group in by_file:
                pieces = [piece for _, piece in group]
                audit.add_file(file.name, map(splits.read_audit, pieces))
                for piece, (name, target) in product(pieces, written.items()):
                    with (piece / f"{name}.jsonl").open("rb") as source:
                        shutil.copyfileobj(source, target)
            for target in written.values():
                target.flush()
                os.fsync(target.fileno())
    except OSError as error:
        raise unwritable(folder, error) from None
