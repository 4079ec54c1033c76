"""The question file in the contest's format, one problem per line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import records
from stepladder.errors import InputError
from stepladder.mcq.repair import Note, clean, note_defects, repair
from stepladder.records import LETTERS, WHOLE_FILE, Language, Question, Span

PROBLEM_FIELDS = ("id", "problem", "questions", "source")
QUESTION_FIELDS = ("question", "options", "answer", "worked", "program")
MISSPELT_SIMILARITY = 0.82
"""Similarity (difflib) from which an unknown field is taken for a misspelt one."""


class Problem(NamedTuple):
    """The sub-questions of one line, in file order."""

    id: str
    line: int
    questions: list[Question]
    notes: list[tuple[str, Note]]
    """(id of the problem or question, note) for everything odd about it."""


def read_problems(path: Path, language: Language, *, labelled: bool) -> list[Problem]:
    """The problems of :func:`stream_problems` as a list, for small files."""
    return list(stream_problems(path, language, labelled=labelled))


def stream_problems(path: Path, language: Language, *, labelled: bool, span: Span = WHOLE_FILE) -> Iterator[Problem]:
    """Read lines ``{"id", "problem", "questions": [{"question", "options", "answer"}]}``, optionally with ``source``,
    and ``worked`` and ``program`` in questions. Defects are repaired where possible (mcq/repair.py), and noted.

    Args:
        labelled: whether every question must have an answer.
        span: the lines to read.

    Raises:
        InputError: naming file, line and field.
    """
    return (_problem(path, number, row, language, labelled) for number, row in rows(path, span))


def rows(path: Path, span: Span = WHOLE_FILE) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object) of every problem. Only ``id``, which must be unique, ``problem`` and the names
    of the problem's fields are checked.

    Raises:
        InputError: naming file, line and field.
    """
    seen: dict[str, int] = {}
    for number, row in records.parse_lines(path, span):
        if not isinstance(row, dict):
            raise InputError(path, "is not a JSON object; one problem a line is expected", line=number)
        for field, meant in _misspelt(row, PROBLEM_FIELDS):
            raise InputError(path, f"unknown field {field!r}; did you mean {meant!r}?", line=number, field=field)
        for field in ("id", "problem"):
            if not isinstance(row.get(field), str):
                reason = "must be a text" if field in row else "is missing; every problem needs one"
                raise InputError(path, reason, line=number, field=field)
        name = row["id"]
        if not name:
            raise InputError(path, "is empty; every problem needs one", line=number, field="id")
        if name in seen:
            reason = f"id {name!r} was used on line {seen[name]}; ids must be unique"
            raise InputError(path, reason, line=number, field="id")
        seen[name] = number
        yield number, row
    if not seen and span == WHOLE_FILE:
        raise InputError(path, "holds no problems; one JSON object a line is expected")


def _misspelt(row: Iterable[str], fields: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Unknown fields of a row that are close to one of ``fields`` it lacks, with that one. All others are metadata."""
    names = set(row)
    for name in sorted(names.difference(fields)):
        if (meant := _closest(name, fields)) is not None and meant not in names:
            yield name, meant


@lru_cache(maxsize=1000)
def _closest(name: str, fields: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(name, fields, 1, MISSPELT_SIMILARITY)), None)


def _problem(path: Path, number: int, row: dict[str, Any], language: Language, labelled: bool) -> Problem:
    def wrong(field: str, problem: str) -> InputError:
        return InputError(path, problem, line=number, field=field)

    if not isinstance(row.get("questions"), list) or not row["questions"]:
        raise wrong("questions", "must be a list with at least one question")
    questions = []
    notes: list[Note] = []
    text = clean(row["problem"], notes)
    note_defects(text, notes)
    problem_notes = [(row["id"], note) for note in notes]
    source = str(row.get("source", path.stem))
    for index, item in enumerate(row["questions"]):
        field = f"questions[{index}]"
        if not isinstance(item, dict):
            raise wrong(field, "must be an object with question, options and answer")
        for name, meant in _misspelt(item, QUESTION_FIELDS):
            raise wrong(f"{field}.{name}", f"unknown field {name!r}; did you mean {meant!r}?")
        if not isinstance(item.get("question"), str):
            raise wrong(f"{field}.question", "must be a text")
        options = item.get("options")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise wrong(f"{field}.options", "must be a list of texts")
        if not 1 <= len(options) <= len(LETTERS):
            raise wrong(f"{field}.options", f"has {len(options)} options; 2 to {len(LETTERS)} are needed")
        answer = item.get("answer")
        if answer is not None and (not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS):
            allowed = LETTERS[: max(2, len(options))]
            raise wrong(f"{field}.answer", f"{answer!r} is not one of the letters {allowed[0]} to {allowed[-1]}")
        repaired = repair(item["question"], tuple(options), answer)
        problem_notes += [(f"{row['id']}#{index}", note) for note in repaired.notes]
        count = len(repaired.options)
        if not 2 <= count <= len(LETTERS):
            raise wrong(f"{field}.options", f"has {count} options; 2 to {len(LETTERS)} are needed")
        if repaired.answer is not None and repaired.answer not in LETTERS[:count]:
            raise wrong(f"{field}.answer", f"{answer!r} is not one of the letters A to {LETTERS[count - 1]}")
        if answer is None and labelled:
            raise wrong(f"{field}.answer", "is missing; training questions need their letter")
        for name in ("worked", "program"):
            if item.get(name) is not None and not isinstance(item[name], str):
                raise wrong(f"{field}.{name}", "must be a text or null")
        questions.append(
            Question(
                id=f"{row['id']}#{index}",
                problem_id=row["id"],
                problem=text,
                question=repaired.question,
                options=repaired.options,
                answer=repaired.answer,
                language=language,
                source=source,
                worked=item.get("worked"),
                program=item.get("program"),
            )
        )
    return Problem(row["id"], number, questions, problem_notes)


def read_questions(paths: Iterable[Path], ids: Set[str], language: Language) -> Iterator[Question]:
    """The labelled questions of some files that have one of these ids.

    Raises:
        InputError: naming file, line and field.
    """
    problem_ids = {name.rpartition("#")[0] for name in ids}
    for path in paths:
        for number, row in rows(path):
            if row["id"] in problem_ids:
                problem = _problem(path, number, row, language, True)
                yield from (question for question in problem.questions if question.id in ids)
