"""The outcome of an attempt, a pure function of its request, its delivery and the price.

answered      a complete answer
truncated     cut off at ``max_tokens``: sent once more with twice the cap
filtered      withheld by the content filter: counts as an answer, and is final
refused       the provider does not accept this prompt and says why (400 with such a code): final for this prompt
rejected      a 400 that does not say whether the prompt is at fault: fatal as a first answer, else only for this prompt
fatal         no prompt would be accepted (bad key, unknown model, no permission): the run stops
rate_limited  429: sent again after a wait; nothing was charged
transient     the server failed (5xx) or could not be reached: sent again; nothing was charged
lost          no complete response (timeout, disconnect, gateway error): sent again, and charged at the worst case
malformed     a response that cannot be parsed: stored, charged at the worst case, sent again
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from stepladder.ask.request import Finish, Request, Response, TokenLogprob, worst_case
from stepladder.config import Price

Kind = Literal[
    "answered",
    "truncated",
    "filtered",
    "refused",
    "rejected",
    "fatal",
    "rate_limited",
    "transient",
    "lost",
    "malformed",
]
FINAL: frozenset[Kind] = frozenset({"answered", "truncated", "filtered", "refused"})
"""Outcomes with a response that the ledger stores."""

FINISHES: Mapping[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "filtered"}
KINDS: Mapping[Finish, Kind] = {"stop": "answered", "length": "truncated", "filtered": "filtered"}

GATEWAY_STATUSES = (502, 504)
"""From a proxy: the server behind it may have finished the answer and billed it."""
PROMPT_CODES = ("content_filter", "context_length_exceeded", "content_policy_violation", "string_above_max_length")
"""Error codes of a 400 that is due to this prompt."""
TOO_LONG_MESSAGE = "maximum context length"
"""In the message of vLLM's 400 for a prompt that is too long, whose error code says nothing."""


class Delivery(NamedTuple):
    """What one attempt returned: a complete HTTP response, or the error instead of one."""

    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = {}
    error: str = ""
    sent: bool = True
    """False if no connection was made, so that nothing can have been billed."""


class Unreachable(Exception):
    """A call other than a chat request (a model list, a batch) got no usable reply; it may be tried again."""


class Outcome(NamedTuple):
    """A delivery, classified and priced."""

    kind: Kind
    charge: int | None
    """Micro-dollars; None if unknown: the attempt stays charged at the worst case that was reserved."""
    response: Response | None = None
    message: str = ""
    retry_after: float | None = None
    """Seconds to wait before the next request, if the server said so."""


def judge(  # noqa: PLR0911
    request: Request, delivery: Delivery, price: Price, timestamp: float | None = None
) -> Outcome:
    """Classify a delivery and compute its charge. Never raises, whatever the bytes are. ``timestamp`` is when the
    delivery came, in seconds since the epoch, by default now."""
    status = delivery.status
    if status is None:
        return (
            Outcome("lost", None, message=delivery.error) if delivery.sent else _uncharged("transient", delivery.error)
        )
    if status == 200:
        return _parse_answer(request, delivery, price)
    message, code = _parse_error(delivery.body)
    message = f"HTTP {status}: {message}"
    if status == 429:
        # A key without credit gets 429 too, and will always get it.
        wait = retry_after(delivery.headers, time.time() if timestamp is None else timestamp)
        kind: Kind = "fatal" if code == "insufficient_quota" else "rate_limited"
        return Outcome(kind, 0, message=message, retry_after=wait)
    if status in GATEWAY_STATUSES:
        return Outcome("lost", None, message=message)
    if status >= 500 or status in (408, 409, 425):
        wait = retry_after(delivery.headers, time.time() if timestamp is None else timestamp)
        return Outcome("transient", 0, message=message, retry_after=wait)
    if code in PROMPT_CODES or status in (413, 422) or (status == 400 and TOO_LONG_MESSAGE in message):
        refusal = Response(
            text="", finish="refused", max_tokens=request.max_tokens, prompt_tokens=0, completion_tokens=0
        )
        return Outcome("refused", 0, refusal, message)
    return _uncharged("rejected" if status == 400 else "fatal", message)


def _uncharged(kind: Kind, message: str) -> Outcome:
    return Outcome(kind, 0, message=message)


def _parse_answer(request: Request, delivery: Delivery, price: Price) -> Outcome:
    """The outcome of a response with status 200."""
    try:
        body = json.loads(delivery.body)
        choice = body["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        finish = FINISHES[choice["finish_reason"]]
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError("the content is not a text")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Outcome("malformed", None, message=f"HTTP 200 that cannot be read ({type(error).__name__}: {error})")
    usage = _parse_usage(request, body, empty=not (text or reasoning))
    charge = None if usage is None else price.of(*usage)
    prompt_tokens, completion_tokens = usage or (0, 0)
    response = Response(
        text=text,
        finish=finish,
        max_tokens=request.max_tokens,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        reasoning=reasoning,
        micro_dollars=worst_case(request, price) if charge is None else charge,
        logprobs=_parse_logprobs(choice),
    )
    return Outcome(KINDS[finish], charge, response)


def _parse_logprobs(choice: Any) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the answer's tokens; empty if they cannot be parsed, since the answer is usable without."""
    try:
        return tuple(
            TokenLogprob(
                str(token["token"]),
                float(token["logprob"]),
                {str(top["token"]): float(top["logprob"]) for top in token.get("top_logprobs") or ()},
            )
            for token in (choice.get("logprobs") or {}).get("content") or ()
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return ()


def _parse_usage(request: Request, body: Any, *, empty: bool) -> tuple[int, int] | None:
    """Prompt and completion tokens as the server reports them, or None if the report is missing or implausible."""
    try:
        prompt, completion = body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError):
        return None
    if type(prompt) is not int or type(completion) is not int:
        return None
    plausible = 0 < prompt <= request.prompt_bound and (0 if empty else 1) <= completion
    return (prompt, completion) if plausible else None


def _parse_error(body: bytes) -> tuple[str, str]:
    """Message and code of an OpenAI-style error body; of any other body its beginning, and no code."""
    try:
        error = json.loads(body)["error"]
        return " ".join(str(error["message"]).split())[:300], str(error.get("code") or error.get("type") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        return " ".join(body[:200].decode(errors="replace").split()) or "no message", ""


def retry_after(headers: Mapping[str, str], timestamp: float) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3), never negative; None
    without such a header. ``timestamp`` is when it came, in seconds since the epoch."""
    value = headers.get("retry-after-ms")
    try:
        if value is not None:
            return max(0.0, float(value) / 1000)
        value = headers.get("retry-after")
        return None if value is None else max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(str(value)).timestamp() - timestamp)
    except ValueError:
        return None
