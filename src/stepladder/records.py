"""Rows that stages hand on, one JSON line each, and reading and writing JSONL files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepladder.errors import InputError

MAX_LINE_BYTES = 10_000_000
"""Of a line of JSONL; parsed, it may take a hundred times the memory."""
MAX_TEXT_BYTES = 100_000_000
"""Of a file that is read as a whole."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Language = Literal["zh", "en"]
Split = Literal["train", "validation", "test"]
SampleVerdict = Literal["accepted", "wrong", "unparsed", "truncated"]


class Record(BaseModel):
    """A frozen row; unknown fields are errors, so that a typo never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(Record):
    """One multiple-choice sub-question with the problem it belongs to.

    ``worked`` is a worked solution without option letters: steps, then the text of the right option alone on the
    last line, so that it stays valid under any order of the options. ``program`` is a closed-world logic program
    that proves the answer.
    """

    id: str
    problem_id: str
    problem: str
    question: str
    options: tuple[str, ...] = Field(min_length=2, max_length=26)
    answer: str | None = None
    language: Language
    source: str
    worked: str | None = None
    program: str | None = None
    reviewed: bool = False
    """Whether somebody has confirmed the label."""


class Sample(Record):
    """One answer to one training question, judged. ``permutation[i]`` is the original index of the option shown
    as letter i; ``answer`` is the strict answer in the original order, or null when none could be read."""

    question_id: str
    rung: str
    model: str
    sample_index: int
    permutation: tuple[int, ...]
    key: str
    text: str
    answer: str | None
    verdict: SampleVerdict
    micro_dollars: int = 0


class Charge(Record):
    """What one answer cost, of those that no sample names: writers' and judges' of new questions."""

    key: str
    micro_dollars: int


CHARGES = "charges.jsonl"
"""File of the variants that holds them."""


class Message(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(Record):
    """One training conversation (the ``{"messages": [...]}`` line TRL and ms-swift read) and where it came from."""

    messages: tuple[Message, ...]
    question_id: str
    teacher: str


class Prediction(Record):
    """What one system answered to one question. Letters are in the original option order; null is unparsed."""

    question_id: str
    member: str
    votes: tuple[str | None, ...]
    answer: str | None
    """The strict answer: the letter that most votes end in."""
    forced: str | None = None
    """Where no vote could be read: the likeliest letter after the first one's text and the beginning of an answer line.
    It is what the question is answered with, and counts as wrong in strict figures."""
    texts: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    """Completion tokens of each vote; empty where they were not counted."""
    likely: dict[str, float] = {}
    """Probability of each letter at the place of the answer's letter, given the text before it, a mean over votes; sums
    to 1. Empty where it was not measured, or no answer could be read."""

    @property
    def letter(self) -> str | None:
        """The letter that the question is answered with: strict, or else forced."""
        return self.answer or self.forced


R = TypeVar("R", bound=Record)


class Span(NamedTuple):
    """Whole lines of a file."""

    begin: int
    """Offset of the first one's first byte."""
    end: int
    """Offset of the first byte behind the last one."""
    line: int
    """Number of the first one, from 1."""


HALF_CHARACTER = "holds half a character (a lone surrogate such as \\ud83d); write whole ones"
WHOLE_FILE = Span(0, sys.maxsize, 1)


def spans(path: Path, size: int) -> list[Span]:
    """A file's lines in spans of about so many bytes.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    found, begin, line = list[Span](), 0, 1
    with _open_bytes(path) as file:
        while piece := file.read(size):
            piece += file.readline(MAX_LINE_BYTES + 1)
            found.append(Span(begin, begin + len(piece), line))
            begin, line = begin + len(piece), line + piece.count(b"\n")
    return found


def read(path: Path, kind: type[R]) -> list[R]:
    """All rows of a JSONL file written by :func:`lines`.

    Raises:
        InputError: naming file, line and field.
    """
    return list(stream(path, kind))


def stream(path: Path, kind: type[R]) -> Iterator[R]:
    """The rows of a JSONL file one by one.

    Raises:
        InputError: naming file, line and field.
    """
    for number, value in parse_lines(path):
        try:
            yield kind.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or None
            raise InputError(path, first["msg"], line=number, field=field) from None


def parse_lines(path: Path, span: Span = WHOLE_FILE) -> Iterator[tuple[int, Any]]:
    """Yield ``(line number, JSON value)`` of every non-empty line, of the whole file or of a span of it.

    Raises:
        InputError: the file is missing or not UTF-8, or a line is not JSON, too long, or cannot be parsed (nested too
            deeply, for example).
    """
    with _open_bytes(path) as file:
        start = span.begin
        file.seek(start)
        # Bytes: only "\n" ends a line, not U+2028 inside a JSON string.
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=span.line):
            if start >= span.end:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise InputError(path, f"is longer than {MAX_LINE_BYTES:,} bytes; split it", line=number)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, start + error.start) from None
            start += len(raw)
            if line.strip():
                yield number, _parse(path, number, line)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: the file is missing, cannot be read, is too large or is not UTF-8.
    """
    with _open_bytes(path) as file:
        content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise InputError(path, f"is larger than {MAX_TEXT_BYTES:,} bytes; split it, or convert it to JSONL")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error.start) from None


@contextmanager
def _open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read bytes.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(path, "no such file; check its path") from None
    except IsADirectoryError:
        raise InputError(path, "is a folder; name a file") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None


def _not_utf8(path: Path, byte: int) -> InputError:
    return InputError(path, f"not UTF-8 at byte {byte}; save the file as UTF-8")


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}, column {error.colno}); write one JSON object a line"
        raise InputError(path, problem, line=number) from None
    except UnicodeEncodeError:
        raise InputError(path, HALF_CHARACTER, line=number) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise InputError(path, f"cannot be read as JSON ({error}); simplify the line", line=number) from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError, RecursionError: it is not JSON; UnicodeEncodeError among them: it holds half a character.
    """
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def lines(rows: Iterable[Record]) -> Iterator[str]:
    """The rows as lines of JSONL, in the same order (stages sort by id)."""
    return (row.model_dump_json() + "\n" for row in rows)
