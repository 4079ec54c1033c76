"""The lines of a batch's files: requests in the input file, deliveries in the output and error files."""

from __future__ import annotations

import json
import re
from typing import Any

from stepladder.ask.foreign_json import custom_id, one_line, read_json, write_json
from stepladder.ask.outcome import Delivery

CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"([1-9][0-9]{0,17})"')
"""In a line that is no JSON."""
UNPROCESSED_CODES = {"batch_expired", "batch_cancelled"}
"""Error codes of requests that the provider did not process."""


def write_line(attempt: int, body: dict[str, Any]) -> bytes:
    """A line of an input file: a body for /chat/completions, with the attempt's id as its custom id."""
    line = {"custom_id": str(attempt), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def read_line(line: bytes) -> tuple[int | None, Delivery]:
    """Parse a line of an output or error file into the attempt's id (None if it has none) and its delivery. A line with
    an id and without a readable delivery is delivered as it is, and will be judged malformed."""
    try:
        row = read_json(line)
        attempt = custom_id(row["custom_id"])
        response, error = row.get("response"), row.get("error") or {}
        if response is not None:
            status = response["status_code"]
            if type(status) is not int or not 100 <= status < 600:
                raise ValueError("no HTTP status")
            return attempt, Delivery(status, write_json(response["body"]))
        if error.get("code") in UNPROCESSED_CODES:
            return attempt, Delivery(error=one_line(str(error.get("message"))), sent=False)
        return attempt, Delivery(500, write_json({"error": error}))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        match = CUSTOM_ID.search(line)
        return (int(match[1]) if match else None), Delivery(200, line)
