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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice, product
from pathlib import Path
from typing import get_args

import numpy as np

from stepladder import records
from stepladder.config import Config
from stepladder.context import Context
from stepladder.documents import Oddity, QuestionAudit
from stepladder.errors import InputError, UserError
from stepladder.mcq.audit import Audit
from stepladder.mcq.overlap import HeldOut, Pair, Shared, problem_text, ranked
from stepladder.mcq.questionfile import Problem, read_reviews, rows, stream_problems
from stepladder.mcq.shuffle import rng
from stepladder.nodes import Nodes
from stepladder.nodes.chosen import nodes_of
from stepladder.nodes.here import Here
from stepladder.records import Span, Split
from stepladder.shards import near, splits
from stepladder.shards.each import Pool
from stepladder.workspace import Artifact, file_digest, write_atomic

PIECE_BYTES = 32 * 2**20
"""Of a question file that one process works on."""


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {"train": _digest(config.questions.train)}
    if config.questions.test is not None:
        inputs["test"] = _digest(config.questions.test)
    if config.questions.reviewed is not None:
        inputs["reviewed"] = _digest(config.questions.reviewed)
    settings = {"language": config.language, "seed": config.seed, "validation": config.questions.validation}
    return Artifact(context.input("questions"), settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    config, files = context.config, context.config.questions
    pool = Pool(_nodes(config), artifact(context, part).scratch(), context.progress.update)
    held_out = _held_out(config)
    reviews = read_reviews(files.reviewed, files.train, config.language) if files.reviewed is not None else {}
    choices = pool.folder / "choices.json"
    write_atomic(choices, json.dumps({"held_out": sorted(held_out), "reviews": reviews}))
    pieces = {path: records.spans(path, PIECE_BYTES) for path in (files.train, files.test) if path is not None}
    audit = Audit()
    audit.twins.add(_twins(config, pool, pieces[files.train]))  # first, so that its memory is free again
    _write(folder, config, pool, choices, pieces, audit)
    audit.document(Counter(review.action for review in reviews.values())).write(folder)
    if counts := audit.counts():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        context.progress.say(f"odd in the input: {kinds}; see {context.input('questions') / QuestionAudit.FILE}")


def _nodes(config: Config) -> Nodes:
    """Where the pieces of files are worked on."""
    return Here() if config.cluster is None else nodes_of(config.cluster)


def _held_out(config: Config) -> set[str]:
    """The first pass over the training problems: ids of those held out for validation."""
    train = config.questions.train
    ids = [row["id"] for _, row in rows(train)]
    if len(ids) < 2:
        raise InputError(train, "holds one problem; at least two are needed, one to train on and one for validation")
    return set(validation_ids(ids, config.questions.validation, config.seed))


def validation_ids(problems: list[str], share: float, seed: int) -> list[str]:
    """The problems held out for validation: at least one, and never all."""
    if len(problems) < 2:
        return []
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    return rng("validation", seed).sample(sorted(problems), count)


def _twins(config: Config, pool: Pool, spans: Sequence[Span]) -> Iterator[Oddity]:
    """Training problems that are in the test in nearly the same words; the trainset leaves them out."""
    train, test = config.questions.train, list[str]()
    held_out = HeldOut.of(_texts(_test(config), test))
    if not len(held_out.vocabulary):
        return
    file, counts = pool.folder / "held-out.npz", pool.folder / "counts.npy"
    held_out.save(file)
    common = {"held_out": str(file.absolute())}
    source = {"file": str(train), "language": config.language}
    pieces = pool.each("shared", "n-grams", [{**common, **source, "span": span} for span in spans])
    total, begins = np.zeros(len(held_out.vocabulary), dtype=np.int64), [0]
    for piece in pieces:
        shared = Shared.load(piece / near.NGRAMS)
        total += shared.counts(len(total))
        begins.append(begins[-1] + len(shared.ids))
    np.save(counts, total)
    counted = {"counts": str(counts.absolute()), "number": begins[-1]}
    orders = [{**common, **counted, "piece": str(piece.absolute())} for piece in pieces]
    found = pool.each("pairs", "near-duplicates", orders)
    places: dict[int, tuple[str, int]] = {}
    pairs = list[Pair]()
    for begin, piece in zip(begins, found, strict=False):
        for _, (index, name, line, other, similarity) in records.parse_lines(piece / near.PAIRS):
            places[begin + index] = name, line
            pairs.append(Pair(begin + index, other, similarity))
    for pair in ranked(pairs):
        name, line = places[pair.left]
        message = f"{name} is nearly {test[pair.right]} of the test (similarity {pair.similarity:.2f})"
        yield Oddity(kind="near-duplicate of a test problem", file=train.name, line=line, message=message)


def _texts(problems: Iterable[Problem], names: list[str]) -> Iterator[str]:
    """The whole text of each problem; its id is appended to ``names``."""
    for problem in problems:
        names.append(problem.id)
        yield problem_text(problem.questions)


def _write(
    folder: Path, config: Config, pool: Pool, choices: Path, files: Mapping[Path, Sequence[Span]], audit: Audit
) -> None:
    """Repair, audit and write the questions of all files.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    common = {"language": config.language, "choices": str(choices.absolute())}
    results = iter(
        pool.each(
            "splits",
            "questions",
            [
                {**common, "file": str(file), "labelled": file == config.questions.train, "span": span}
                for file, spans in files.items()
                for span in spans
            ],
        )
    )
    try:
        with ExitStack() as stack:
            written = {name: stack.enter_context((folder / f"{name}.jsonl").open("wb")) for name in get_args(Split)}
            for file, spans in files.items():
                pieces = [*islice(results, len(spans))]
                audit.add_file(file.name, map(splits.read_audit, pieces))
                for piece, (name, target) in product(pieces, written.items()):
                    with (piece / f"{name}.jsonl").open("rb") as source:
                        shutil.copyfileobj(source, target)
            for target in written.values():
                target.flush()
                os.fsync(target.fileno())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); free some space, or use another --runs"
        ) from None


def _test(config: Config) -> Iterator[Problem]:
    """The problems of the test; none without one."""
    test = config.questions.test
    return iter(()) if test is None else stream_problems(test, config.language, labelled=False)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(path, "no such file; check [questions] in the configuration")
    return file_digest(path)
