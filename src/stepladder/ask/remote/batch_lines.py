"""The lines of a batch's files: requests on the way out, deliveries on the way back."""

from __future__ import annotations

import json
import re
from typing import Any

from stepladder.ask.outcome import Delivery

UNDONE = {"batch_expired", "batch_cancelled"}
"""Error codes of lines that nobody worked on."""


def write_line(attempt: int, body: dict[str, Any]) -> bytes:
    """A line of an input file: a body for /chat/completions, with the attempt's number as its custom id."""
    line = {"custom_id": str(attempt), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def read_line(line: bytes) -> tuple[int | None, Delivery]:
    """A line of an output or error file: the attempt it answers, and the delivery as one attempt would have had it."""
    try:
        row = json.loads(line)
        number = int(row["custom_id"])
        response, error = row.get("response"), row.get("error") or {}
        if response is not None:
            body = json.dumps(response["body"], ensure_ascii=False).encode()
            return number, Delivery(int(response["status_code"]), body)
        if error.get("code") in UNDONE:
            return number, Delivery(error=str(error.get("message")), sent=False)
        return number, Delivery(500, json.dumps({"error": error}, ensure_ascii=False).encode())
    except (ValueError, LookupError, TypeError, AttributeError):
        named = re.search(rb'"custom_id"\s*:\s*"(\d+)"', line)
        return (int(named[1]) if named else None), Delivery(200, line)
