"""``stepladder import``: converts multiple-choice questions in common formats to the question file of a run.

A format is a function from a file to :class:`SourceRow` values; in :func:`converted` answers become letters, and in
:func:`problems` rows that share a passage become one problem.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import records
from stepladder.errors import InputError, UserError
from stepladder.isolation import parquet
from stepladder.records import LETTERS, WHOLE_FILE, Span


class Columns(NamedTuple):
    """Which columns of a table hold what."""

    question: str = "question"
    options: tuple[str, ...] = ()
    """One column that holds a list, or one column per option; empty: recognised by the names in :data:`OPTIONS`."""
    answer: str | None = None
    """None: recognised by the names in :data:`ANSWERS`."""
    passage: str | None = None
    """None: recognised by the names in :data:`PASSAGES`, if there is any."""
    one_based: bool = False
    """Whether answers given as numbers count from 1, not from 0."""


class SourceFormat(NamedTuple):
    """How a file is to be read."""

    columns: Columns
    name: str | None = None
    """Of the format; None: guessed from the file."""


class ImportedQuestion(NamedTuple):
    """A question in the contest's format."""

    stem: str
    """Of its file's name."""
    passage: str
    """The text that it is about, maybe empty."""
    question: dict[str, Any]
    """Its fields."""


class SourceRow(NamedTuple):
    """One question as read from the source file."""

    line: int
    passage: str
    question: str
    options: tuple[str, ...]
    answer: Any
    """A letter, a number, an option's text, or None."""


# The usual names of columns, the most likely first.
OPTIONS = ("options", "choices", "answers", "endings")
ANSWERS = ("answer", "label", "target", "correct", "answer_idx", "gold")
PASSAGES = ("passage", "context", "problem", "article", "premise")
_LETTERED = re.compile(r"^\s*+[(（]?([A-Za-z])[)）.、．:：]\s*+")
_BBH_OPTION = re.compile(r"^[^\S\n]*+\(([A-Z])\)[^\S\n]*+(\S.*)$", re.MULTILINE)
_LOGIQA_OPTION = re.compile(r"^\s*+([A-D])\s*+[.、．)）]\s*+(.*)$")


def converted(source: Path, form: SourceFormat, span: Span = WHOLE_FILE) -> Iterator[ImportedQuestion]:
    """The questions of a file, or of some lines of a JSONL file.

    Raises:
        UserError: an unknown format.
        InputError: naming file, line and field.
    """
    if form.name is not None and form.name not in FORMATS:
        raise UserError(f"there is no format {form.name!r}; choose from {', '.join(FORMATS)}")
    for row in FORMATS[form.name or guess(source)](source, form.columns, span):
        options = _unlettered(row.options)
        if not 2 <= len(options) <= len(LETTERS):
            reason = f"has {len(options)} options; 2 to {len(LETTERS)} are needed"
            raise InputError(source, reason, line=row.line, field="options")
        question: dict[str, Any] = {"question": row.question, "options": list(options)}
        if row.answer is not None:
            question["answer"] = _letter(source, row, options, form.columns.one_based)
        yield ImportedQuestion(source.stem, row.passage.strip(), question)


def problems(read: Callable[[], Iterable[ImportedQuestion]]) -> Iterator[dict[str, Any]]:
    """The problems of a question file, in the order of their first questions: questions that share a passage are one.
    ``read`` returns the same questions twice. Only problems that wait for more questions are kept, and a digest of each
    passage."""
    left: Counter[bytes | int] = Counter(_digest(item.passage) for item in read() if item.passage)
    waiting: OrderedDict[bytes | int, dict[str, Any]] = OrderedDict()
    number = 0
    for count, (stem, passage, question) in enumerate(read()):
        key = _digest(passage) if passage else count
        if key not in waiting:
            waiting[key] = {"id": f"{stem}-{number}", "problem": passage, "questions": []}
            number += 1
        waiting[key]["questions"].append(question)
        if passage:
            left[key] -= 1
        while waiting and not left[next(iter(waiting))]:
            yield waiting.popitem(last=False)[1]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def guess(source: Path) -> str:
    """The format of a file, from its suffix and its first values."""
    suffix = source.suffix.lower()
    if suffix == ".txt":
        return "logiqa"
    if suffix == ".csv":
        first = next(iter(_csv(source)), (0, []))[1]
        return "mmlu" if len(first) > 3 and first[-1].strip() in LETTERS[: len(first) - 2] else "table"
    if suffix == ".json":
        value = _json(source)
        return "bbh" if isinstance(value, dict) and "examples" in value else "table"
    if suffix in (".jsonl", ".parquet"):
        return "table"
    raise UserError(f"{source}: its name does not tell the format; name it with --format ({', '.join(FORMATS)})")


def splits_at_lines(source: Path, form: SourceFormat) -> bool:
    """Whether some lines of a file can be read without the others."""
    return (form.name or guess(source)) == "table" and source.suffix.lower() not in READERS


def table(source: Path, columns: Columns, span: Span) -> Iterator[SourceRow]:
    """Rows with named fields: JSON (a list of objects), JSONL (as AGIEval's), CSV with a header, Parquet."""
    reader = READERS.get(source.suffix.lower())
    for line, row in reader(source) if reader else records.parse_lines(source, span):
        if not isinstance(row, dict):
            raise InputError(source, "is not an object with named fields", line=line)
        passage = columns.passage or next((name for name in PASSAGES if row.get(name)), None)
        answer = columns.answer or next((name for name in ANSWERS if row.get(name) not in (None, "")), None)
        for name in (columns.question, columns.passage, columns.answer):
            if name is not None and name not in row:
                raise InputError(
                    source, f"has no such field; there are {', '.join(map(str, row))}", line=line, field=name
                )
        yield SourceRow(
            line,
            str(row.get(passage) or "") if passage else "",
            str(row[columns.question]),
            _options(source, line, row, columns.options),
            row.get(answer) if answer else None,
        )


def _options(source: Path, line: int, row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    value: Any = None
    if len(names) > 1:
        if missing := [name for name in names if name not in row]:
            raise InputError(source, "has no such field", line=line, field=missing[0])
        value = [row[name] for name in names if row[name] not in (None, "")]
    else:
        name = names[0] if names else next((name for name in OPTIONS if row.get(name)), None)
        value = row.get(name) if name else [row[letter] for letter in LETTERS if row.get(letter) not in (None, "")]
    if isinstance(value, dict):  # as Hugging Face has them: {"label": ["A", ...], "text": [...]}, or {"A": ...}
        value = value.get("text") or list(value.values())
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise InputError(source, "has no list of options; name it with --options", line=line, field="options")
    return tuple(str(option) for option in value)


def mmlu(source: Path, columns: Columns, span: Span) -> Iterator[SourceRow]:
    """MMLU's CSV: question, options, letter, and no header."""
    for line, cells in _csv(source):
        yield SourceRow(line, "", cells[0], tuple(cells[1:-1]), cells[-1].strip())


def bbh(source: Path, columns: Columns, span: Span) -> Iterator[SourceRow]:
    """BIG-Bench Hard: ``{"examples": [{"input": "... Options: (A) ...", "target": "(A)"}]}``."""
    value = _json(source)
    examples = value.get("examples") if isinstance(value, dict) else None
    if not isinstance(examples, list):
        raise InputError(source, 'holds no list "examples"', field="examples")
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, dict) or not isinstance(example.get("input"), str):
            raise InputError(source, f"example {number} has no text", field="input")
        stem, _, listed = example["input"].rpartition("Options:")
        options = tuple(text.rstrip() for _, text in _BBH_OPTION.findall(listed))
        if not options:
            raise InputError(source, f"example {number} is not multiple choice: no line '(A) ...'", field="input")
        yield SourceRow(number, "", stem.strip(), options, example.get("target"))


def logiqa(source: Path, columns: Columns, span: Span) -> Iterator[SourceRow]:
    """LogiQA's text: blocks of a letter, a passage, a question and lettered options, with an empty line between."""
    block: list[str] = []
    lines = records.read_text(source).split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line.strip())
        elif block:
            yield _logiqa(source, number - len(block), block)
            block = []


def _logiqa(source: Path, line: int, block: list[str]) -> SourceRow:
    options = [match[2] for text in block if (match := _LOGIQA_OPTION.match(text))]
    body = [text for text in block if not _LOGIQA_OPTION.match(text)]
    if len(body) < 3 or len(body[0]) != 1:
        raise InputError(source, "a block needs a letter, a passage, a question and options, a line each", line=line)
    return SourceRow(line, "\n".join(body[1:-1]), body[-1], tuple(options), body[0].upper())


FORMATS: Mapping[str, Callable[[Path, Columns, Span], Iterable[SourceRow]]] = {
    "table": table,
    "mmlu": mmlu,
    "bbh": bbh,
    "logiqa": logiqa,
}


def _letter(source: Path, row: SourceRow, options: Sequence[str], one_based: bool) -> str:
    """The letter of a row's answer, which may be a letter, a number or an option's text."""
    answer = row.answer
    allowed = LETTERS[: len(options)]
    if isinstance(answer, str):
        answer = answer.strip()
        stripped = answer.strip("()（）. ").upper()
        if len(stripped) == 1 and stripped in allowed:
            return stripped
        texts = [option.strip() for option in options]
        if texts.count(answer) == 1:
            return allowed[texts.index(answer)]
        answer = int(answer) if answer.isdecimal() else answer
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= (index := answer - one_based) < len(options):
        return allowed[index]
    reason = f"{row.answer!r} is neither a letter from A to {allowed[-1]} nor the number or text of one option"
    raise InputError(source, reason, line=row.line, field="answer")


def _unlettered(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options without the "(A)" or "A." before them, if every option begins with its own letter."""
    matches = [_LETTERED.match(option) for option in options]
    all_lettered = all(match and match[1].upper() == letter for match, letter in zip(matches, LETTERS, strict=False))
    return (
        tuple(_LETTERED.sub("", option, count=1).strip() for option in options) if all_lettered and options else options
    )


# Reading files


def _json(source: Path) -> Any:
    try:
        return records.parse_json(records.read_text(source))
    except UnicodeEncodeError:
        raise InputError(source, records.HALF_CHARACTER) from None
    except (ValueError, RecursionError) as error:
        raise InputError(source, f"not JSON ({error})") from None


def _json_rows(source: Path) -> Iterator[tuple[int, Any]]:
    value = _json(source)
    if not isinstance(value, list):
        raise InputError(source, "is not a list of objects")
    return iter(enumerate(value, start=1))


def _csv(source: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(records.read_text(source).splitlines(keepends=True))
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(source, f"not CSV ({error})", line=reader.line_num) from None


def _csv_rows(source: Path) -> Iterator[tuple[int, Any]]:
    rows = _csv(source)
    _, header = next(rows, (0, []))
    for line, cells in rows:
        yield line, dict(zip(header, cells, strict=False))


READERS: Mapping[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": parquet.rows,
}
"""Of tables, by suffix; other files hold a JSON object a line."""
