"""The lines of a batch's files: requests in the input file, deliveries in the output and error files."""

from __future__ import annotations

import json
import re
from typing import Any

from stepladder.ask.outcome import Delivery

UNPROCESSED_CODES = {"batch_expired", "batch_cancelled"}
"""Error codes of requests that the provider did not process."""


def write_line(attempt: int, body: dict[str, Any]) -> bytes:
    """A line of an input file: a body for /chat/completions, with the attempt's id as its custom id."""
    line = {"custom_id": str(attempt), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def read_line(line: bytes) -> tuple[int | None, Delivery]:
    """Parse a line of an output or error file into the attempt's id (None if it has none) and its delivery."""
    try:
        row = json.loads(line)
        attempt = int(row["custom_id"])
        response, error = row.get("response"), row.get("error") or {}
        if response is not None:
            body = json.dumps(response["body"], ensure_ascii=False).encode()
            return attempt, Delivery(int(response["status_code"]), body)
        if error.get("code") in UNPROCESSED_CODES:
            return attempt, Delivery(error=str(error.get("message")), sent=False)
        return attempt, Delivery(500, json.dumps({"error": error}, ensure_ascii=False).encode())
    except (ValueError, LookupError, TypeError, AttributeError):
        custom_id = re.search(rb'"custom_id"\s*:\s*"(\d+)"', line)
        return (int(custom_id[1]) if custom_id else None), Delivery(200, line)
