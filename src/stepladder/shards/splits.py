"""The questions of a piece of a file, repaired, audited, and divided among training, validation and test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from stepladder import records
from stepladder.documents import PieceAudit
from stepladder.mcq.audit import PieceAuditor, Text
from stepladder.mcq.overlap import problem_text
from stepladder.mcq.questionfile import stream_problems
from stepladder.mcq.reviews import Review
from stepladder.records import Question, Span, Split

TEXTS = "texts.jsonl"
"""File of a result: ``[id, line, digest of the text]`` of each problem of the piece."""


def splits(order: Mapping[str, Any], result: Path) -> None:
    """The questions in lines ``span`` of ``file`` in ``language``, ``labelled`` or those of the test, a file for each
    split. ``choices`` is a file of the ids of problems ``held_out`` for validation, and of ``reviews`` by question."""
    path, labelled = Path(order["file"]), order["labelled"]
    choices = json.loads(Path(order["choices"]).read_text(encoding="utf-8"))
    held_out = {*choices["held_out"]}
    reviews = {name: Review(*review) for name, review in choices["reviews"].items()}
    auditor, counts = PieceAuditor(), Counter[Split]()
    problems = stream_problems(path, order["language"], labelled=labelled, span=Span(*order["span"]))
    with ExitStack() as stack:

        def opened(name: str) -> Any:
            return stack.enter_context((result / name).open("w", encoding="utf-8", newline="\n"))

        files: dict[Split, Any] = {split: opened(f"{split}.jsonl") for split in get_args(Split)}
        texts = opened(TEXTS)
        for problem in auditor.watch(path.name, problems):
            digest = hashlib.blake2b(problem_text(problem.questions).encode(), digest_size=16).hexdigest()
            texts.write(json.dumps([problem.id, problem.line, digest]) + "\n")
            split: Split = "test" if not labelled else "validation" if problem.id in held_out else "train"
            questions = _as_reviewed(problem.questions, reviews) if labelled else problem.questions
            files[split].writelines(records.lines(questions))
            counts[split] += len(questions)
    auditor.document(counts).write(result)


def read_audit(result: Path) -> tuple[PieceAudit, Iterator[Text]]:
    """The audit in a result, and the texts of its problems."""
    return PieceAudit.read(result), (Text(*text) for _, text in records.parse_lines(result / TEXTS))


def _as_reviewed(questions: list[Question], reviews: Mapping[str, Review]) -> list[Question]:
    """A problem's questions with their reviewed labels, without those that a review drops."""
    kept = []
    for question in questions:
        review = reviews.get(question.id)
        if review is None:
            kept.append(question)
        elif review.action != "drop":
            answer = review.answer or question.answer
            kept.append(question.model_copy(update={"answer": answer, "reviewed": True}))
    return kept
