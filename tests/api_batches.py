"""Files and batches of the test server: what a half-price answer goes through on its way back."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs

from api_provider import Order, Provider, Reply, to_json
from api_script import Refusal

CHAT = "/v1/chat/completions"
ENDED = {"cancelled", "completed", "expired", "failed"}
TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


@dataclass(slots=True)
class File:
    """A stored file; of an output file also which lines count as delivered with it."""

    view: dict[str, Any]
    content: bytes
    orders: list[Order] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    custom_id: str
    body: dict[str, Any]


@dataclass(slots=True)
class Batch:
    """``lines`` is empty until they are validated."""

    view: dict[str, Any]
    polls: int = 0
    lines: list[Line] = field(default_factory=list)

    def tokens(self, provider: Provider) -> int:
        """Of its prompts."""
        return sum(provider.prompt_tokens(line.body) for line in self.lines)


class Batches:
    """A batch moves only when it is looked at, so that a test and not a clock decides how far it is."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.files: dict[str, File] = {}
        self.uploads = 0
        self.batches: dict[str, Batch] = {}

    def route(self, method: str, path: str, query: str, kind: str, body: bytes) -> Reply | None:  # noqa: PLR0911
        """The reply to a request under /v1, or None if it is not about files or batches."""
        match (method, *path.strip("/").split("/")[1:]):
            case ("POST", "files"):
                return self.upload(kind, body)
            case ("GET", "files"):
                return listing([file.view for file in self.files.values()], query)
            case ("GET", "files", name):
                return Reply(to_json(self.file(name).view))
            case ("GET", "files", name, "content"):
                file = self.file(name)
                return Reply(file.content, orders=file.orders)
            case ("DELETE", "files", name):
                del self.files[self.file(name).view["id"]]
                return Reply(to_json({"id": name, "object": "file", "deleted": True}))
            case ("POST", "batches"):
                return self.create(body)
            case ("GET", "batches"):
                return listing([batch.view for batch in self.batches.values()], query)
            case ("GET", "batches", name):
                batch = self.batch(name)
                self.advance(batch)
                return Reply(to_json(batch.view))
            case ("POST", "batches", name, "cancel"):
                return self.cancel(self.batch(name))
        return None

    def file(self, name: str) -> File:
        if name not in self.files:
            raise Refusal(404, f"No such File object: {name}")
        return self.files[name]

    def batch(self, name: str) -> Batch:
        if name not in self.batches:
            raise Refusal(404, f"No batch found with id '{name}'.")
        return self.batches[name]

    def keep(self, filename: str, purpose: str, content: bytes) -> File:
        self.uploads += 1
        name = f"file-{self.uploads}"
        view = {"id": name, "object": "file", "bytes": len(content), "created_at": int(time.time())}
        view |= {"filename": filename, "purpose": purpose, "status": "processed"}
        self.files[name] = File(view, content)
        return self.files[name]

    def upload(self, kind: str, body: bytes) -> Reply:
        form = parts(kind, body)
        if "file" not in form or form.get("purpose", ("", b""))[1] != b"batch":
            raise Refusal(400, "An upload needs the fields 'purpose' (which must be batch) and 'file'.")
        filename, content = form["file"]
        file = self.keep(filename, "batch", content)
        if "expires_after[seconds]" in form:
            file.view["expires_at"] = file.view["created_at"] + int(form["expires_after[seconds]"][1])
        if self.provider.strike("upload_lost", content):
            raise Refusal(500, "The script says upload_lost.", why="upload_lost")
        return Reply(to_json(file.view))

    def create(self, body: bytes) -> Reply:
        wanted = from_json(body)
        if wanted.get("endpoint") != CHAT or wanted.get("completion_window") != "24h":
            raise Refusal(400, f"The endpoint must be {CHAT} and the completion_window 24h.")
        source = self.files.get(str(wanted.get("input_file_id")))
        if source is None:
            raise Refusal(400, f"Invalid 'input_file_id': {wanted.get('input_file_id')}.")
        name, now = f"batch_{len(self.batches) + 1}", int(time.time())
        view = {"id": name, "object": "batch", "endpoint": CHAT, "errors": None, "input_file_id": source.view["id"]}
        view |= {"completion_window": "24h", "status": "validating", "output_file_id": None, "error_file_id": None}
        view |= {"output_expires_after": wanted.get("output_expires_after")}
        view |= {"created_at": now, "expires_at": now + 24 * 3600, **dict.fromkeys(TIMES)}
        view |= {"request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": wanted.get("metadata")}
        self.batches[name] = Batch(view)
        return Reply(to_json(view), fault=self.provider.strike("batch_lost", source.content))

    def cancel(self, batch: Batch) -> Reply:
        if batch.view["status"] in ENDED:
            raise Refusal(409, f"Cannot cancel a batch with status '{batch.view['status']}'.")
        enter(batch, "cancelling")
        return Reply(to_json(batch.view))

    def advance(self, batch: Batch) -> None:
        """One poll further. Nothing of a cancelled batch is done or paid."""
        status = batch.view["status"]
        if status in ENDED:
            return
        if status == "cancelling":
            enter(batch, "cancelled")
            return
        batch.polls += 1
        if status == "validating":
            batch.lines, errors = self.read(self.files[batch.view["input_file_id"]].content)
            errors = errors or self.queue_errors(batch)
            if errors:
                batch.view["errors"] = {"object": "list", "data": errors}
                enter(batch, "failed")
                return
            batch.view["request_counts"]["total"] = len(batch.lines)
            enter(batch, "in_progress")
        if batch.polls >= self.provider.script.batch_polls:
            self.finish(batch)

    def read(self, content: bytes) -> tuple[list[Line], list[dict[str, Any]]]:
        """The lines, and what is wrong with them: one bad line fails the whole batch, unpaid."""
        lines: dict[str, Line] = {}
        errors = []
        for number, raw in enumerate(content.splitlines(), start=1):
            try:
                line = from_json(raw)
                name = line.get("custom_id")
                if not isinstance(name, str) or name in lines:
                    raise Refusal(400, "Every line needs a custom_id of its own.", "duplicate_custom_id")
                if line.get("method") != "POST" or line.get("url") != CHAT:
                    raise Refusal(400, f"Every line must be a POST to {CHAT}.", "invalid_url")
                lines[name] = Line(name, self.provider.check(line.get("body")))
            except Refusal as refusal:
                error = refusal.body["error"]
                errors.append({"code": error["code"], "message": error["message"], "param": None, "line": number})
        if not content.strip():
            errors.append({"code": "empty_file", "message": "The file is empty.", "param": None, "line": None})
        return list(lines.values()), errors

    def queue_errors(self, batch: Batch) -> list[dict[str, Any]]:
        """What OpenAI says of a batch that does not fit into the queue (github.com/openai/openai-python/issues/2084;
        the limit of 90,000: community.openai.com/t/1027303)."""
        limit = self.provider.script.batch_queue_tokens
        waiting = [other for other in self.batches.values() if other.view["status"] == "in_progress"]
        if limit is None or sum(entry.tokens(self.provider) for entry in (*waiting, batch)) <= limit:
            return []
        message = (
            f"Enqueued token limit reached for {batch.lines[0].body['model']} in organization org-test. Limit: "
            f"{limit:,} enqueued tokens. Please try again once some in_progress batches have been completed."
        )
        return [{"code": "token_limit_exceeded", "message": message, "param": None, "line": None}]

    def finish(self, batch: Batch) -> None:
        """Answer and bill the lines (of an expiring batch only the first ones) and store the two files."""
        source = self.files[batch.view["input_file_id"]].content
        expired = self.provider.strike("batch_expired", source)
        lines = batch.lines
        done = len(lines) if expired is None else int(len(lines) * expired.done)
        output: list[bytes] = []
        errors: list[bytes] = []
        orders = []
        for place, line in enumerate(lines):
            row: dict[str, Any] = {"id": f"{batch.view['id']}_{place}", "custom_id": line.custom_id}
            if place >= done:
                late = "This request could not be executed before the completion window expired."
                errors.append(to_json(row | {"response": None, "error": {"code": "batch_expired", "message": late}}))
                continue
            n = self.provider.number()
            try:
                order = self.provider.serve(n, line.body, wire_hash(line.body), custom_id=line.custom_id)
            except Refusal as refusal:
                self.provider.refuse(n, refusal.status, refusal.fault)
                answer = {"status_code": refusal.status, "request_id": f"req_{n}", "body": refusal.body}
                errors.append(to_json(row | {"response": answer, "error": None}))
                continue
            if order.kind == "line_error":
                failed = {"code": "server_error", "message": "The script says line_error."}
                errors.append(to_json(row | {"response": None, "error": failed}))
            elif order.kind == "malformed":
                output.append(to_json(row)[:-1])
            elif order.kind != "line_missing":
                answer = {"status_code": 200, "request_id": f"req_{n}", "body": order.reply}
                output.append(to_json(row | {"response": answer, "error": None}))
                orders.append(order)
        if self.provider.strike("batch_shuffled", source):
            self.provider.dice(batch.view["id"]).shuffle(output)
        for key, rows in (("output_file_id", output), ("error_file_id", errors)):
            if rows:
                file = self.keep(f"{batch.view['id']}_{key[:-8]}.jsonl", "batch_output", b"\n".join(rows) + b"\n")
                file.orders = orders if rows is output else []
                batch.view[key] = file.view["id"]
        counts = {"total": len(lines), "completed": len(lines) - len(errors), "failed": len(errors)}
        batch.view["request_counts"] = counts
        enter(batch, "completed" if expired is None else "expired")


def enter(batch: Batch, status: str) -> None:
    batch.view["status"] = status
    batch.view[f"{status}_at"] = int(time.time())


def listing(views: Iterable[dict[str, Any]], query: str) -> Reply:
    """The newest first, one page of ``limit`` behind the id ``after``."""
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    newest = list(reversed(list(views)))
    ids = [view["id"] for view in newest]
    if "after" in asked and asked["after"] not in ids:
        raise Refusal(400, f"There is nothing with the id '{asked['after']}'.")
    start = ids.index(asked["after"]) + 1 if "after" in asked else 0
    limit = asked.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit) <= 100:
        raise Refusal(400, "The limit must be between 1 and 100.")
    page = newest[start : start + int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return Reply(to_json({"object": "list", "data": page, **ends, "has_more": start + len(page) < len(newest)}))


def from_json(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        raise Refusal(400, "This is not JSON.", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "This is not a JSON object.", "invalid_json")
    return value


def wire_hash(body: dict[str, Any]) -> str:
    """The hash this body has on its own: compact JSON is what HTTP clients send."""
    return sha256(
        json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    ).hexdigest()


def parts(kind: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Fields of multipart/form-data: name -> (filename, content)."""
    boundary = re.search(r'boundary="?([^";]+)"?', kind)
    if not kind.startswith("multipart/form-data") or boundary is None:
        raise Refusal(400, "An upload must be multipart/form-data.")
    found = {}
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        named = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode(errors="replace")))
        found[named.get("name", "")] = (named.get("filename", ""), content)
    return found
