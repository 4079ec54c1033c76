"""JSON from a server: whatever its bytes are, reading them ends in a value or in a ValueError."""

from __future__ import annotations

import json
import re
from typing import Any

from stepladder.text import printable, well_formed

MAX_IDENTIFIER_CHARACTERS = 256
MAX_MESSAGE_CHARACTERS = 300
_CUSTOM_ID = re.compile(r"[1-9][0-9]{0,17}")


def read_json(body: bytes) -> Any:
    """The value of a JSON text. Bytes that are no UTF-8 become U+FFFD, so that one of them costs no answer. Numbers may
    be infinite or no number at all (``NaN``): whoever uses one checks it.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(body.decode("utf-8-sig", errors="replace"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(value: object) -> bytes:
    """A value that :func:`read_json` has returned, as JSON again.

    Raises:
        ValueError: it is nested too deeply.
    """
    try:
        return well_formed(json.dumps(value, ensure_ascii=False)).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def identifier(value: object) -> str:
    """A server's id of something.

    Raises:
        ValueError: it is no text that could be one.
    """
    if isinstance(value, str) and 0 < len(value) <= MAX_IDENTIFIER_CHARACTERS and value.isprintable():
        return value
    raise ValueError("an id is missing")


def custom_id(value: object) -> int:
    """The id of an attempt, as a batch's lines carry it.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and _CUSTOM_ID.fullmatch(value):
        return int(value)
    raise ValueError("the custom id is none of ours")


def one_line(text: str) -> str:
    """A server's text as a message: one line of limited length that a terminal may be given."""
    return printable(well_formed(" ".join(text[: 4 * MAX_MESSAGE_CHARACTERS].split())))[:MAX_MESSAGE_CHARACTERS]
