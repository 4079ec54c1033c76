"""What is in a run's folder, so that a page finds it at once: every question, chain and answer by where it is in its
file, with what they can be filtered and sorted by. Nothing is written into the run.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

from stepladder.answering.cascade import WORKED
from stepladder.config import VARIANTS
from stepladder.records import Prediction, Question, Sample, Split
from stepladder.stages.variants import JUDGED, UNPROVED
from stepladder.workspace import MANIFEST

CHECK_SECONDS = 2.0
"""Between two looks whether the run has made something new."""
PAGE_SIZE = 50
VARIANT = "variant"
"""The split of questions that models wrote."""
HELD_OUT: tuple[Split, ...] = ("validation", "test")
SCHEMA = """
CREATE TABLE question (
    id TEXT PRIMARY KEY, split TEXT, source TEXT, language TEXT, label TEXT, reviewed INTEGER,
    text TEXT, file INTEGER, begin INTEGER, length INTEGER, suspicion REAL, suggested TEXT, share REAL, rung TEXT,
    is_proved INTEGER
) WITHOUT ROWID;
CREATE TABLE chain (
    question TEXT, rung TEXT, model TEXT, verdict TEXT, letter TEXT, accepted INTEGER, file INTEGER, begin INTEGER,
    length INTEGER
);
CREATE TABLE answer (
    question TEXT, system TEXT, is_right INTEGER, file INTEGER, begin INTEGER, length INTEGER
);
"""
INDEXES = """
CREATE INDEX chain_question ON chain (question);
CREATE INDEX chain_verdict ON chain (verdict, model, question);
CREATE INDEX answer_question ON answer (question);
CREATE INDEX answer_system ON answer (system, is_right, question);
UPDATE question SET
    rung = (SELECT rung FROM chain WHERE question = question.id AND accepted ORDER BY chain.ROWID LIMIT 1),
    share = (SELECT AVG(letter = question.label) FROM chain
             WHERE question = question.id AND letter IS NOT NULL AND model != '{worked}')
WHERE split IN ('train', 'variant');
UPDATE question SET
    share = (SELECT AVG(is_right) FROM answer WHERE question = question.id AND is_right IS NOT NULL)
WHERE split IN ('validation', 'test');
UPDATE question SET
    is_proved = EXISTS (SELECT 1 FROM chain WHERE question = question.id AND accepted AND model = '{worked}');
CREATE INDEX question_doubt ON question ({doubt});
"""
ORDER_BY = {"doubt": "suspicion IS NULL, suspicion DESC, is_proved, COALESCE(share, 1), id", "id": "id"}
FILTERS: Mapping[str, str] = {
    "split": "split = ?",
    "source": "source = ?",
    "language": "language = ?",
    "rung": "rung = ?",
    "verdict": "id IN (SELECT question FROM chain WHERE verdict = ?)",
    "model": "id IN (SELECT question FROM chain WHERE model = ?)",
    "wrong": "id IN (SELECT question FROM answer WHERE system = ? AND is_right = 0)",
    "right": "id IN (SELECT question FROM answer WHERE system = ? AND is_right = 1)",
    "q": "text LIKE '%' || ? || '%' ESCAPE '\\'",
    "suspect": "suspicion IS NOT NULL AND ? != ''",
    "unsolved": "rung IS NULL AND split = 'train' AND ? != ''",
    "decided": "id IN (SELECT value FROM JSON_EACH(?))",
}
"""By the name in a page's address."""
CHOICES: Mapping[str, str] = {
    "split": "SELECT split, COUNT(*) FROM question GROUP BY split ORDER BY split = 'test', split",
    "source": "SELECT source, COUNT(*) FROM question GROUP BY source ORDER BY source LIMIT 200",
    "language": "SELECT language, COUNT(*) FROM question GROUP BY language ORDER BY language",
    "rung": "SELECT rung, COUNT(*) FROM question WHERE rung IS NOT NULL GROUP BY rung ORDER BY rung",
    "verdict": "SELECT verdict, COUNT(DISTINCT question) FROM chain GROUP BY verdict ORDER BY verdict",
    "model": "SELECT model, COUNT(DISTINCT question) FROM chain GROUP BY model ORDER BY model",
    "wrong": "SELECT system, COUNT(*) FROM answer WHERE is_right = 0 GROUP BY system ORDER BY system",
}
"""What each filter may be set to, and how many questions that leaves."""


class Row(NamedTuple):
    """A question in a list."""

    id: str
    split: str
    source: str
    label: str | None
    suspicion: float | None
    suggested: str | None
    share: float | None
    rung: str | None
    text: str


class Answered(NamedTuple):
    """What one system answered to a question."""

    system: str
    prediction: Prediction
    is_right: bool | None


class Whole(NamedTuple):
    """A question with everything that is known about it."""

    row: Row
    question: Question
    chains: Sequence[tuple[Sample, bool]]
    """With whether each is accepted."""
    answers: Sequence[Answered]


class Index:
    """The questions, chains and answers of a run, as its files were when this was made.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._db = sqlite3.connect("", check_same_thread=False)  # a file without a name, which ends with this
        self._lock = threading.Lock()
        self._files: list[BinaryIO] = []
        weakref.finalize(self, _close, self._db, self._files)  # a request may read when another takes its place
        self._db.executescript(SCHEMA)
        self._add_questions()
        self._add_chains()
        self._add_answers()
        self._db.executescript(INDEXES.format(worked=WORKED, doubt=ORDER_BY["doubt"]))

    def _lines(self, path: Path) -> Iterator[tuple[Any, tuple[int, int, int]]]:
        """The rows of a file, and where each is: file, offset and length."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        self._files.append(file)  # open as long as this is, whatever the run puts in its place
        number, begin = len(self._files) - 1, 0
        for line in file:
            yield json.loads(line), (number, begin, len(line))
            begin += len(line)

    def _add_questions(self) -> None:
        suspects = {
            row["id"]: (row["score"], row["suggested"]) for row, _ in self._lines(self._folder / "samples/audit.jsonl")
        }
        files = [(str(split), self._folder / "questions" / f"{split}.jsonl") for split in get_args(Split)]
        files += [(VARIANT, self._folder / VARIANTS / name) for name in ("questions.jsonl", UNPROVED)]
        rows = (
            (
                row["id"], split, row["source"], row["language"], row["answer"], row["reviewed"],
                "\n".join((row["id"], row["problem"], row["question"], *row["options"])), *place,
                *suspects.get(row["id"], (None, None)), None, None, None,
            )
            for split, path in files
            for row, place in self._lines(path)
        )  # fmt: skip
        self._insert("question", rows)

    def _add_chains(self) -> None:
        accepted_files = ("samples/accepted.jsonl", "samples/validation_accepted.jsonl", f"{VARIANTS}/accepted.jsonl")
        other_files = ("samples/rejected.jsonl", "samples/validation_rejected.jsonl", f"{VARIANTS}/{JUDGED}")
        for name in (*accepted_files, *other_files):
            accepted = name in accepted_files
            rows = (
                (row["question_id"], row["rung"], row["model"], row["verdict"], row["answer"], accepted, *place)
                for row, place in self._lines(self._folder / name)
            )
            self._insert("chain", rows)

    def _add_answers(self) -> None:
        labels = dict(self._db.execute("SELECT id, label FROM question"))
        for system, _, path in systems(self._folder):
            rows = (
                (
                    row["question_id"], system,
                    None if labels.get(row["question_id"]) is None else letter == labels[row["question_id"]], *place,
                )
                for row, place in self._lines(path)
                for letter in [row["answer"] or row.get("forced")]
            )  # fmt: skip
            self._insert("answer", rows)

    def _insert(self, table: str, rows: Iterator[tuple[Any, ...]]) -> None:
        first = next(rows, None)
        if first is not None:
            marks = ", ".join("?" * len(first))
            self._db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", first)  # noqa: S608  # our own names
            self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)  # noqa: S608

    def _select(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def find(self, filters: Mapping[str, str], sort: str, begin: int, count: int) -> tuple[int, list[Row]]:
        """How many questions pass all filters, and some of them, in order. The filter ``decided`` is a JSON list of
        ids, since decisions are not in the run's folder."""
        where, values = _where(filters)
        (total,) = self._select(f"SELECT COUNT(*) FROM question WHERE {where}", values)[0]  # noqa: S608
        columns = "id, split, source, label, suspicion, suggested, share, rung, SUBSTR(text, LENGTH(id) + 2, 300)"
        order = ORDER_BY.get(sort, ORDER_BY["doubt"])
        query = f"SELECT {columns} FROM question WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?"  # noqa: S608
        return total, [Row(*row) for row in self._select(query, [*values, count, begin])]

    @cached_property
    def choices(self) -> dict[str, list[tuple[str, int]]]:
        """What each filter may be set to, and how many questions that leaves."""
        return {name: [(str(value), count) for value, count in self._select(query)] for name, query in CHOICES.items()}

    @cached_property
    def doubtful(self) -> list[str]:
        """Ids of the questions whose label is suspect, the most suspect first, then of those whose label most answers
        contradict and no worked solution proves, then of those that a model wrote and nothing has proved."""
        is_doubtful = "split = 'train' AND (suspicion IS NOT NULL OR share < 0.5 AND NOT is_proved) AND NOT reviewed"
        is_unproved = "split = 'variant' AND rung IS NULL"
        order = f"split = 'variant', {ORDER_BY['doubt']}"
        query = f"SELECT id FROM question WHERE {is_doubtful} OR {is_unproved} ORDER BY {order}"  # noqa: S608
        return [name for (name,) in self._select(query)]

    def whole(self, name: str) -> Whole | None:
        """Everything about a question; None if there is no such one."""
        columns = "id, split, source, label, suspicion, suggested, share, rung, '', file, begin, length"
        found = self._select(f"SELECT {columns} FROM question WHERE id = ?", [name])  # noqa: S608
        if not found:
            return None
        *row, file, begin, length = found[0]
        query = "SELECT accepted, file, begin, length FROM chain WHERE question = ? ORDER BY ROWID"
        chains = [(self._row(Sample, *place), bool(accepted)) for accepted, *place in self._select(query, [name])]
        query = "SELECT system, is_right, file, begin, length FROM answer WHERE question = ? ORDER BY ROWID"
        answers = [
            Answered(system, self._row(Prediction, *place), None if is_right is None else bool(is_right))
            for system, is_right, *place in self._select(query, [name])
        ]
        return Whole(Row(*row), self._row(Question, file, begin, length), chains, answers)

    def right(self, system: str, split: str) -> dict[str, bool]:
        """Whether a system has each labelled question of a split right."""
        query = (
            "SELECT question, is_right FROM answer JOIN question ON question.id = question "
            "WHERE system = ? AND split = ? AND is_right IS NOT NULL"
        )
        return {name: bool(is_right) for name, is_right in self._select(query, [system, split])}

    def _row(self, kind: Any, file: int, begin: int, length: int) -> Any:
        return kind.model_validate_json(os.pread(self._files[file].fileno(), length, begin))


def _close(db: sqlite3.Connection, files: Sequence[BinaryIO]) -> None:
    db.close()
    for file in files:
        file.close()


def systems(folder: Path) -> Iterator[tuple[str, Split, Path]]:
    """Systems that a run has answers of, the splits that they answered, and the files."""
    for split in HELD_OUT:
        files = {"base": folder / "predictions" / "base" / f"base.{split}.jsonl"}
        for member in sorted(folder.glob("predictions/*/")):
            files |= {f"{member.name} {form}": member / f"{form}.{split}.jsonl" for form in ("merged", "quantised")}
        files["ensemble"] = folder / "ensemble" / f"{split}.jsonl"
        yield from ((name, split, path) for name, path in files.items() if path.is_file())


def _where(filters: Mapping[str, str]) -> tuple[str, list[str]]:
    known = [(name, value) for name, value in filters.items() if name in FILTERS and value]
    values = [_like(value) if name == "q" else value for name, value in known]
    return " AND ".join(FILTERS[name] for name, _ in known) or "1", values


def _like(text: str) -> str:
    """A text with the signs that LIKE reads otherwise as themselves."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


class Current:
    """The index of a run as it is now: it is made again when the run has made something new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._made_of: list[tuple[str, int]] = []
        self._checked = 0.0

    def __call__(self) -> Index:
        with self._lock:
            if self._index is None or time.monotonic() > self._checked + CHECK_SECONDS:
                self._checked = time.monotonic()
                manifests = self._manifests()
                if self._index is None or manifests != self._made_of:
                    self._index, self._made_of = Index(self._folder), manifests
            return self._index

    def _manifests(self) -> list[tuple[str, int]]:
        folder = self._folder
        found = [folder / stage / MANIFEST for stage in ("questions", "samples", VARIANTS, "ensemble")]
        found += folder.glob(f"predictions/*/{MANIFEST}")
        return [(str(path), path.stat().st_mtime_ns) for path in sorted(found) if path.exists()]
