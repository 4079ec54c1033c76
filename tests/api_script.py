"""The script of the test server: one JSON object that says how it answers and what goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from email.utils import formatdate
from typing import Literal, Self

REFUSALS = {"400", "403", "429", "500", "503"}
"""Answered with that status; nothing is billed."""
SHAPES = {"content_filter", "empty_choices", "length", "malformed", "no_usage", "wrong_usage"}
"""Billed, with something odd in the reply."""
WIRE = {"disconnect_after", "disconnect_before", "duplicate", "hang", "hostile", "slow_drip", "truncated_body"}
"""Something odd on the connection; billed, but for ``disconnect_before`` and a ``hang`` that says otherwise.
A ``hostile`` reply is one of api_hostile.py."""
LINES = {"line_error", "line_missing"}
"""A batch line that ends in the error file without a status, or in neither file."""
BATCHES = {"batch_expired", "batch_lost", "batch_shuffled", "upload_lost"}
"""Befalls a whole batch; ``batch_lost`` and ``upload_lost`` are done, and then not (or wrongly) confirmed."""
SPOILT = {"disconnect_after", "empty_choices", "hang", "line_missing", "malformed", "truncated_body"}
"""Paid, and never a complete correct reply, however it was sent."""

PARAMETERS = {
    **{kind: {"retry_after", "http_date", "code"} for kind in REFUSALS},
    "hang": {"seconds", "billed"},
    "slow_drip": {"seconds"},
    "line_missing": {"billed"},
    "batch_expired": {"done"},
}
"""Which kinds take which parameters, besides share, times and match."""

CODES: Mapping[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("request_forbidden", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "not_found"),
    409: ("invalid_request_error", "conflict"),
    429: ("requests", "rate_limit_exceeded"),
}
"""Type and code of OpenAI's error by status; all others are a server_error without code."""


class ScriptError(ValueError):
    """A script that says something the server does not know: a fault that is silently skipped tests nothing."""


class Refusal(Exception):
    """A request turned down, in OpenAI's words."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        why: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.fault = why
        """The scripted fault that caused it, if one did."""
        kind, usual = CODES.get(status, ("server_error", None))
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code or usual}}


@dataclass(frozen=True)
class Table:
    """A JSON object of the script; unknown keys are errors."""

    @classmethod
    def read(cls, raw: object) -> Self:
        if not isinstance(raw, dict):
            raise ScriptError(f"{cls.__name__} must be an object, not {raw!r}")
        if unknown := sorted(set(raw) - {f.name for f in fields(cls)}):
            raise ScriptError(f"{cls.__name__} has no {', '.join(map(repr, unknown))}")
        return cls(**raw)


@dataclass(frozen=True)
class Price(Table):
    """Dollars per million tokens, which is micro-dollars per token."""

    input: float = 1
    output: float = 2


@dataclass(frozen=True)
class RateLimit(Table):
    """A token bucket over chat requests."""

    requests_per_s: float = 10
    """How fast the bucket fills."""
    burst: float = 10
    """What it holds; also what x-ratelimit-limit-requests says."""


@dataclass(frozen=True)
class Fault(Table):
    """Something that goes wrong with a share of the requests."""

    kind: str = ""
    """One of the kinds above."""
    share: float = 1
    """Share of the requests that match. Shares of several faults add up; the earlier in the list goes first."""
    times: int | None = None
    """At most so often; which requests it is then depends on who comes first, unless the share is 1 and they do not
    compete."""
    match: str | None = None
    """Substring of the last user message (for faults of whole batches: of the input file)."""
    retry_after: float | None = None
    """Seconds in Retry-After; none leaves the header out."""
    http_date: bool = False
    """Give Retry-After as a date, rounded up to a whole second."""
    code: str | None = None
    """``error.code`` instead of the usual one of the status, such as insufficient_quota."""
    seconds: float = 1
    """How long it hangs (at most: it ends when the client hangs up) or drips."""
    billed: bool = True
    """Whether a request that hangs or a line that goes missing is paid for."""
    done: float = 0.5
    """Share of the lines an expiring batch got done, from the top."""

    def __post_init__(self) -> None:
        if self.kind not in REFUSALS | SHAPES | WIRE | LINES | BATCHES:
            raise ScriptError(f"there is no fault {self.kind!r}")
        if not 0 <= self.share <= 1:
            raise ScriptError(f"the share of {self.kind} must be between 0 and 1")

    @classmethod
    def read(cls, raw: object) -> Self:
        fault = super().read(raw)
        assert isinstance(raw, dict)
        if foreign := sorted(set(raw) - {"kind", "share", "times", "match"} - PARAMETERS.get(fault.kind, set())):
            raise ScriptError(f"fault {fault.kind} has no {', '.join(map(repr, foreign))}")
        return fault

    def refusal(self) -> Refusal:
        headers = {}
        if self.retry_after is not None:
            late = math.ceil(time.time() + self.retry_after)
            headers["Retry-After"] = formatdate(late, usegmt=True) if self.http_date else f"{self.retry_after:g}"
        return Refusal(int(self.kind), f"The script says {self.kind}.", self.code, headers, self.kind)


@dataclass(frozen=True)
class Script(Table):
    """What the server does, all of it."""

    models: Sequence[str] = ("test-model",)
    """The models there are; all others are a 404."""
    latency_s: float | Sequence[float] = 0
    """Seconds between the bill and the reply, or [low, high] to draw from."""
    completion_tokens: int | Sequence[int] | Literal["cap"] = 8
    """What an answer costs, [low, high] to draw from, or exactly the request's cap. More than the cap is cut there:
    finish_reason is 'length' and the last line is missing."""
    prompt_tokens: int | Literal["words"] = "words"
    """What a prompt costs, or 'words': 4 a message and 1 a word."""
    content: str = "echo {last} #{sample}\nAnswer: A"
    """The answer: {last} is the last user message's first 40 characters, {sample} the request's ``seed`` or 0."""
    price: Price = field(default_factory=Price)
    """Of a token; batches pay half."""
    faults: Sequence[Fault] = ()
    """What goes wrong."""
    rate_limit: RateLimit | None = None
    """Real 429s; refused requests do not count as seen, so timing does not change which faults are drawn."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every reply."""
    tokens: Sequence[int] | None = None
    """What /tokenize, as vLLM has it, says of every conversation; without it there is no such place."""
    batch_polls: int = 2
    """At which GET of a batch it is done; every one before says in_progress."""
    batch_queue_tokens: int | None = None
    """Most prompt tokens of batches in progress; a batch that does not fit fails when it is validated, as OpenAI's."""

    @classmethod
    def read(cls, raw: object) -> Self:
        if isinstance(raw, dict):
            raw = dict(raw)
            raw["price"] = Price.read(raw.get("price", {}))
            raw["faults"] = tuple(Fault.read(fault) for fault in raw.get("faults", ()))
            if raw.get("rate_limit") is not None:
                raw["rate_limit"] = RateLimit.read(raw["rate_limit"])
        return super().read(raw)
