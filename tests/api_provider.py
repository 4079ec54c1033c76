"""The imaginary provider behind the test server: what it answers, and the books it keeps; no sockets.

The books are a JSONL file, one ``write`` an event, so they outlive whoever is killed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import sha256
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from random import Random
from typing import Any

from api_hostile import HOSTILE, UNREADABLE
from api_script import LINES, REFUSALS, SHAPES, SPOILT, WIRE, Fault, Refusal, Script

NO_CAP = 4096
"""The cap of a request that names none."""


@dataclass(frozen=True, slots=True)
class Order:
    """A request that was not turned down: what it costs, and what becomes of it."""

    n: int
    body_sha256: str
    reply: Mapping[str, Any]
    fault: Fault | None
    latency_s: float = 0
    hostile: str = ""
    """Which of the hostile replies it is."""

    @property
    def kind(self) -> str:
        return self.fault.kind if self.fault else ""


@dataclass(slots=True)
class Reply:
    """What is to be sent."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    """What goes wrong while it is sent."""
    orders: list[Order] = field(default_factory=list)
    """What has been delivered once the client has it."""


def to_json(value: object) -> bytes:
    return json.dumps(value).encode()


class Provider:
    """Answers and bills. ``n`` numbers the requests, and every one is either billed or refused in the books."""

    def __init__(self, books: Path, script: Script, seed: int = 0) -> None:
        self.books = os.open(books, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.seed = seed
        self.requests = self.billed = self.refused = self.micro_dollars = 0
        self.seen: Counter[str] = Counter()
        self.identities: Counter[str] = Counter()
        self.bodies: Counter[str] = Counter()
        self.use(script)

    def use(self, script: Script) -> None:
        """From now on do this: faults and the bucket start anew, what was seen and billed stays."""
        self.script = script
        self.prices = Decimal(str(script.price.input)), Decimal(str(script.price.output))
        self.struck = [0] * len(script.faults)
        self.bucket = script.rate_limit.burst if script.rate_limit else 0.0
        self.filled = time.monotonic()

    # What happens

    def number(self) -> int:
        self.requests += 1
        return self.requests

    def dice(self, identity: str) -> Random:
        """The same for the same request asked for the same time, whatever else is going on."""
        self.seen[identity] += 1
        return Random(f"{self.seed}:{identity}:{self.seen[identity]}")

    def draw(self, dice: Random, kinds: Iterable[str], text: str) -> Fault | None:
        roll = dice.random()
        for place, fault in enumerate(self.script.faults):
            if fault.kind not in kinds or (fault.match is not None and fault.match not in text):
                continue
            if fault.times is not None and self.struck[place] >= fault.times:
                continue
            roll -= fault.share
            if roll < 0:
                self.struck[place] += 1
                return fault
        return None

    def strike(self, kind: str, content: bytes) -> Fault | None:
        """The fault of this kind for something about a whole input file."""
        if all(fault.kind != kind for fault in self.script.faults):
            return None
        dice = self.dice(f"{kind}:{sha256(content).hexdigest()}")
        return self.draw(dice, {kind}, content.decode(errors="replace"))

    def limit(self, body: Mapping[str, Any]) -> dict[str, str]:
        """Take one from the bucket: the headers that say what is left, or a refusal with the wait for the next."""
        rate = self.script.rate_limit
        if rate is None:
            return {}
        now = time.monotonic()
        self.bucket = min(rate.burst, self.bucket + (now - self.filled) * rate.requests_per_s)
        self.filled = now
        allowed = self.bucket >= 1
        self.bucket -= allowed
        full = math.ceil((rate.burst - self.bucket) / rate.requests_per_s * 1000)
        headers = {
            "x-ratelimit-limit-requests": f"{rate.burst:g}",
            "x-ratelimit-remaining-requests": str(int(self.bucket)),
            "x-ratelimit-reset-requests": f"{full}ms" if full < 1000 else f"{full / 1000:g}s",
        }
        if not allowed:
            wait = math.ceil((1 - self.bucket) / rate.requests_per_s * 1000) / 1000
            headers["Retry-After"] = f"{wait:g}"
            raise Refusal(429, "Rate limit reached for requests.", None, headers, "rate_limit")
        return headers

    def check(self, body: object) -> dict[str, Any]:
        """The body of a chat request, or a refusal like the real one's."""
        if not isinstance(body, dict):
            raise Refusal(400, "The body must be a JSON object.")
        if body.get("model") not in self.script.models:
            missing = f"The model `{body.get('model')}` does not exist or you do not have access to it."
            raise Refusal(404, missing, "model_not_found")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise Refusal(400, "'messages' must be a list of messages and not empty.")
        if body.get("stream") or body.get("n") not in (None, 1):
            raise Refusal(400, "This server neither streams nor gives more than one choice.")
        cap = cap_of(body)
        if not isinstance(cap, int) or cap < 1:
            raise Refusal(400, "The cap of tokens must be a whole number of at least 1.")
        return body

    def prompt_tokens(self, body: Mapping[str, Any]) -> int:
        return words(body) if self.script.prompt_tokens == "words" else self.script.prompt_tokens

    def serve(
        self, n: int, body: dict[str, Any], sha: str, *, key: str | None = None, custom_id: str | None = None
    ) -> Order:
        """Decide what happens and bill it, before any waiting: who gives up meanwhile pays all the same.

        The draws do not depend on what else is going on, only on the request and how often it came before.
        A ``custom_id`` makes it a line of a batch. Raises a Refusal that the caller books.
        """
        script, last = self.script, last_user(body)
        identity = sha if custom_id is None else f"{sha}:{custom_id}"
        dice = self.dice(identity)
        fault = self.draw(dice, REFUSALS | SHAPES | (WIRE if custom_id is None else LINES), last)
        kind = fault.kind if fault else ""
        if fault and kind in REFUSALS:
            raise fault.refusal()
        if fault and (kind in {"disconnect_before", "line_error"} or not fault.billed):
            self.refuse(n, 0, kind)
            return Order(n, sha, {}, fault)
        latency = script.latency_s
        latency_s = latency if isinstance(latency, int | float) else dice.uniform(*latency)
        cap, tokens = cap_of(body), script.completion_tokens
        if tokens == "cap" or kind == "length":
            completion = cap
        else:
            completion = tokens if isinstance(tokens, int) else dice.randint(int(tokens[0]), int(tokens[1]))
        cut = completion > cap or kind == "length"
        completion = min(completion, cap)
        prompt = self.prompt_tokens(body)
        text = script.content.replace("{sample}", str(body.get("seed") or 0)).replace("{last}", last[:40])
        if kind == "content_filter":
            text, finish = "", "content_filter"
        elif cut:
            text, finish = text.rpartition("\n")[0], "length"
        else:
            finish = "stop"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        reply: dict[str, Any] = {
            "id": f"chatcmpl-{sha[:16]}-{self.seen[identity]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [] if kind == "empty_choices" else [choice],
        }
        if kind != "no_usage":
            reply["usage"] = dict.fromkeys(usage, 0) if kind == "wrong_usage" else usage
        self.bill(n, sha, prompt, completion, kind, key, custom_id)
        hostile = dice.choice(sorted(HOSTILE)) if kind == "hostile" else ""
        return Order(n, sha, reply, fault, latency_s, hostile)

    # The books

    def bill(
        self, n: int, sha: str, prompt: int, completion: int, kind: str, key: str | None, custom_id: str | None
    ) -> None:
        exact = prompt * self.prices[0] + completion * self.prices[1]
        cost = math.ceil(exact if custom_id is None else exact / 2)
        self.billed += 1
        self.micro_dollars += cost
        self.bodies[sha] += 1
        # Two lines of one body under two names are two samples; the same name again is the same line sent again.
        self.identities[key or (sha if custom_id is None else f"{sha}:{custom_id}")] += 1
        self._write(
            f'{{"event": "billed", "n": {n}, "body_sha256": "{sha}", "idempotency_key": {_text(key)}, '
            f'"micro_dollars": {cost}, "prompt_tokens": {prompt}, "completion_tokens": {completion}, '
            f'"fault": {_text(kind)}, "custom_id": {_text(custom_id)}, "t": {time.time():.6f}}}\n'
        )

    def deliver(self, order: Order) -> None:
        if order.kind not in SPOILT and order.hostile not in UNREADABLE:
            self._write(
                f'{{"event": "delivered", "n": {order.n}, "body_sha256": "{order.body_sha256}", '
                f'"fault": {_text(order.kind)}, "t": {time.time():.6f}}}\n'
            )

    def refuse(self, n: int, status: int, kind: str = "") -> None:
        """Status 0 is no answer at all."""
        self.refused += 1
        self._write(
            f'{{"event": "refused", "n": {n}, "status": {status}, "fault": {_text(kind)}, "t": {time.time():.6f}}}\n'
        )

    def _write(self, line: str) -> None:
        os.write(self.books, line.encode())

    def billing(self) -> dict[str, int]:
        return {
            "requests": self.requests,
            "billed": self.billed,
            "refused": self.refused,
            "micro_dollars": self.micro_dollars,
            "duplicates": sum(times > 1 for times in self.identities.values()),
            "duplicate_bodies": sum(times > 1 for times in self.bodies.values()),
        }


def _text(value: str | None) -> str:
    return quoted(value) if value else "null"


def cap_of(body: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if (cap := body.get(name)) is not None:
            return cap  # type: ignore[no-any-return]  # check() has looked at it
    return NO_CAP


def plain(message: Mapping[str, Any]) -> str:
    """The text of a message, also of one in parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def last_user(body: Mapping[str, Any]) -> str:
    return next((plain(m) for m in reversed(body["messages"]) if m.get("role") == "user"), "")


def words(body: Mapping[str, Any]) -> int:
    return sum(4 + len(plain(message).split()) for message in body["messages"])
