"""The batch API of an OpenAI-compatible provider (platform.openai.com/docs/guides/batch)."""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from stepladder.ask.foreign_json import identifier, one_line, read_json
from stepladder.ask.outcome import Unreachable, parse_error, redirect_message
from stepladder.ask.remote.batch_queue import QueueRefusal, read_refusal
from stepladder.ask.remote.wire import Wire, reason
from stepladder.errors import AskError

INTENT_KEY = "stepladder_intent"
"""The key of the intent in a batch's metadata."""
MAX_RECORD_BYTES = 16_000_000
"""Of one page of batches; a batch that failed lists what is wrong with its lines."""
PAGE, MAX_PAGES = 100, 1_000
"""Batches on a page of the list, and pages that are read of it."""
FILE_LIFETIME_SECONDS = 14 * 24 * 3600
"""After which the provider deletes files that nobody collects."""
EXPIRY = {"anchor": "created_at", "seconds": FILE_LIFETIME_SECONDS}


class BatchRecord(NamedTuple):
    """What the provider says of a batch."""

    id: str
    status: str
    intent: str | None = None
    input_file: str | None = None
    result_files: tuple[str, ...] = ()
    completed: int = 0
    """Lines that are done."""
    reasons: tuple[str, ...] = ()
    """Why it failed."""
    queue_refusal: QueueRefusal | None = None
    """Set if it failed because it did not fit into the queue."""


class Refused(AskError):
    """The provider rejects the call, and would reject it again."""


class Gone(Refused):
    """The provider has no batch or file of that id."""


class QueueFull(Refused):
    """The batch does not fit into the provider's queue."""

    def __init__(self, refusal: QueueRefusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class BatchApi:
    """The batches of one account.

    Every method raises :class:`Unreachable` when there was no usable reply, so that the call may be tried again,
    :class:`Gone` when the provider has no such batch or file, and :class:`Refused` when it rejects the call.
    """

    def __init__(self, base_url: str, key: str, timeout: float) -> None:
        self._wire, self._key = Wire(base_url, key, timeout), key
        self._address = base_url.rstrip("/")

    def upload(self, content: bytes) -> str:
        """Upload an input file; returns its id."""
        file = {"file": ("requests.jsonl", content)}
        expiry = {f"expires_after[{key}]": str(value) for key, value in EXPIRY.items()}
        try:
            record = self._json("POST", "/files", data={"purpose": "batch", **expiry}, files=file)
        except Refused:  # perhaps by a provider that knows no such field
            record = self._json("POST", "/files", data={"purpose": "batch"}, files=file)
        return _id(record)

    def create(self, file: str, intent: str) -> str:
        """Start a batch over an uploaded file; returns its id.

        Raises:
            QueueFull: the provider says at once that it does not fit into the queue.
        """
        wanted = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {INTENT_KEY: intent},
        }
        try:
            record = self._json("POST", "/batches", json={**wanted, "output_expires_after": EXPIRY})
        except QueueFull:
            raise
        except Refused:  # perhaps by a provider that knows no such field
            record = self._json("POST", "/batches", json=wanted)
        return _id(record)

    def retrieve(self, batch: str) -> BatchRecord:
        """The provider's record of a batch."""
        return _record(self._json("GET", f"/batches/{urllib.parse.quote(batch, safe='')}"))

    def list_batches(self) -> Iterator[BatchRecord]:
        """The provider's records of all batches of the account, newest first."""
        seen: set[str] = set()
        after: dict[str, str] = {}
        for _ in range(MAX_PAGES):
            page = self._json("GET", "/batches", params={"limit": str(PAGE), **after})
            rows = page.get("data")
            records = []
            for row in rows if isinstance(rows, list) else []:
                with contextlib.suppress(Unreachable):  # what is no record is none of ours
                    records.append(_record(row))
            yield from records
            new = {record.id for record in records} - seen
            if not new or page.get("has_more") is False:
                return
            seen |= new
            after = {"after": records[-1].id}
        raise Unreachable(f"{self._address}: its list of batches does not end")

    def content(self, file: str, limit_bytes: int) -> bytes:
        """The bytes of a file; of one that is longer than ``limit_bytes``, its beginning."""
        return self._fetch("GET", f"/files/{urllib.parse.quote(file, safe='')}/content", limit_bytes)

    def delete(self, file: str) -> None:
        """Delete a file."""
        self._fetch("DELETE", f"/files/{urllib.parse.quote(file, safe='')}", MAX_RECORD_BYTES)

    def close(self) -> None:
        self._wire.close()

    def _json(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        body = self._fetch(method, path, MAX_RECORD_BYTES, **content)
        try:
            value = read_json(body)
        except ValueError as error:
            raise Unreachable(f"{self._address}: a reply that is no JSON ({one_line(str(error))})") from None
        if not isinstance(value, dict):
            raise Unreachable(f"{self._address}: a reply that is no JSON object")
        return value

    def _fetch(self, method: str, path: str, limit_bytes: int, **content: Any) -> bytes:
        try:
            reply = self._wire.fetch(method, f"{self._address}{path}", limit_bytes, **content)
        except Exception as error:  # noqa: BLE001 (the libraries raise all sorts of errors at bytes that are no HTTP)
            raise Unreachable(reason(error, self._key)) from None
        if 200 <= reply.status < 300:
            if reply.flaw and len(reply.body) < limit_bytes:
                raise Unreachable(f"{self._address}: a reply that is {reply.flaw}")
            return reply.body
        if 300 <= reply.status < 400:
            raise Refused(f"{self._address}: {redirect_message(reply.status, reply.headers)}")
        message, code = parse_error(reply.body)
        if reply.status < 500 and (refusal := read_refusal(code, message)) is not None:
            raise QueueFull(refusal)
        temporary = reply.status >= 500 or reply.status in (408, 409, 429)
        kind = Unreachable if temporary else Gone if reply.status == 404 else Refused
        raise kind(f"{self._address}: HTTP {reply.status}: {message}")


def _id(record: dict[str, Any]) -> str:
    try:
        return identifier(record.get("id"))
    except ValueError as error:
        raise Unreachable(f"a reply in which {error}") from None


def _record(row: Any) -> BatchRecord:
    """Check a record of a batch; what is odd in it, beside its id and status, is left out.

    Raises:
        Unreachable: it has no id or no status.
    """
    if not isinstance(row, dict) or not isinstance(row.get("status"), str):
        raise Unreachable("a record of a batch without a status")
    metadata, counts, errors = (_dict(row.get(name)) for name in ("metadata", "request_counts", "errors"))
    intent, completed, reasons = metadata.get(INTENT_KEY), counts.get("completed"), errors.get("data")
    flaws = [_dict(error) for error in reasons[:2]] if isinstance(reasons, list) else []
    messages = [flaw.get("message") for flaw in flaws]
    refusals = [refusal for flaw in flaws if (refusal := read_refusal(flaw.get("code"), flaw.get("message")))]
    results = (row.get("output_file_id"), row.get("error_file_id"))
    return BatchRecord(
        id=_id(row),
        status=one_line(row["status"]),
        intent=intent if isinstance(intent, str) else None,
        input_file=_id({"id": row["input_file_id"]}) if row.get("input_file_id") else None,
        result_files=tuple(_id({"id": file}) for file in results if file),
        completed=completed if type(completed) is int and completed >= 0 else 0,
        reasons=tuple(one_line(message) for message in messages if isinstance(message, str)),
        queue_refusal=refusals[0] if refusals and row["status"] == "failed" else None,
    )


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
