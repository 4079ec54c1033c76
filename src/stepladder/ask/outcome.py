"""What an attempt came to. Pure: a delivery is judged the same today and when the ledger is read again.

answered      a whole answer
truncated     cut off at the cap: asked once more with twice the cap
filtered      withheld by the content filter: an answer, and final
refused       the provider says why it will not take this prompt (400 with such a code): final for this prompt
rejected      a 400 that does not say whether it is the prompt: fatal as a first answer, this prompt's fault later
fatal         nobody's prompt is taken (bad key, unknown model, no permission): the run stops
rate_limited  429: waits, then goes again; nothing was charged
transient     the server said it failed (5xx), or was not reached: goes again; nothing was charged
lost          no whole response (timeout, disconnect, gateway error): goes again, and stays charged at the worst
malformed     a response that cannot be read: kept, charged at the worst, goes again
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
"""Outcomes that leave a response in the ledger."""

FINISHES: Mapping[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "filtered"}
KINDS: Mapping[Finish, Kind] = {"stop": "answered", "length": "truncated", "filtered": "filtered"}

GATEWAYS = (502, 504)
"""Answers of a proxy: what stands behind it may have finished, and billed."""
PROMPT_CODES = ("content_filter", "context_length_exceeded", "content_policy_violation", "string_above_max_length")
"""Error codes of a 400 that is about this prompt and no other."""
TOO_LONG = "maximum context length"
"""What a 400 says of such a prompt where its code is no more than 400 (vLLM)."""


class Delivery(NamedTuple):
    """What one attempt brought back: a whole HTTP response, or the error instead of one."""

    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = {}
    error: str = ""
    sent: bool = True
    """False: the connection was never made, so nothing can have been billed."""


class Unreachable(Exception):
    """No usable answer to something that is not a request for one; another try may bring it."""


class Outcome(NamedTuple):
    """A judged delivery."""

    kind: Kind
    charge: int | None
    """Micro-dollars; None: unknown, so the worst case that was reserved stays."""
    response: Response | None = None
    message: str = ""
    retry_after: float | None = None
    """Seconds the server asked to be left alone."""


def judge(request: Request, delivery: Delivery, price: Price, now: float | None = None) -> Outcome:  # noqa: PLR0911
    """Classify a delivery and say what it cost. Never raises, whatever the bytes are."""
    status = delivery.status
    if status is None:
        return Outcome("lost", None, message=delivery.error) if delivery.sent else _free("transient", delivery.error)
    if status == 200:
        return _answer(request, delivery, price)
    message, code = _error(delivery.body)
    message = f"HTTP {status}: {message}"
    if status == 429:
        # A key without credit says 429 too, and will say so for ever.
        wait = retry_after(delivery.headers, time.time() if now is None else now)
        kind: Kind = "fatal" if code == "insufficient_quota" else "rate_limited"
        return Outcome(kind, 0, message=message, retry_after=wait)
    if status in GATEWAYS:
        return Outcome("lost", None, message=message)
    if status >= 500 or status in (408, 409, 425):
        wait = retry_after(delivery.headers, time.time() if now is None else now)
        return Outcome("transient", 0, message=message, retry_after=wait)
    if code in PROMPT_CODES or status in (413, 422) or (status == 400 and TOO_LONG in message):
        refusal = Response(
            text="", finish="refused", max_tokens=request.max_tokens, prompt_tokens=0, completion_tokens=0
        )
        return Outcome("refused", 0, refusal, message)
    return _free("rejected" if status == 400 else "fatal", message)


def _free(kind: Kind, message: str) -> Outcome:
    return Outcome(kind, 0, message=message)


def _answer(request: Request, delivery: Delivery, price: Price) -> Outcome:
    """A 200: the answer, or bytes that hold none."""
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
    usage = _usage(request, body, empty=not (text or reasoning))
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
        logprobs=_logprobs(choice),
    )
    return Outcome(KINDS[finish], charge, response)


def _logprobs(choice: Any) -> tuple[TokenLogprob, ...]:
    """What the server tells of each token; nothing where that cannot be read, since the answer is good without."""
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


def _usage(request: Request, body: Any, *, empty: bool) -> tuple[int, int] | None:
    """Prompt and completion tokens as the server counted them, or None where that cannot be right."""
    try:
        prompt, completion = body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError):
        return None
    if type(prompt) is not int or type(completion) is not int:
        return None
    plausible = 0 < prompt <= request.prompt_bound and (0 if empty else 1) <= completion
    return (prompt, completion) if plausible else None


def _error(body: bytes) -> tuple[str, str]:
    """Message and code of an error in the protocol's form, or the beginning of whatever came instead."""
    try:
        error = json.loads(body)["error"]
        return " ".join(str(error["message"]).split())[:300], str(error.get("code") or error.get("type") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        return " ".join(body[:200].decode(errors="replace").split()) or "no message", ""


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date (RFC 9110, 10.2.3), never negative."""
    value = headers.get("retry-after-ms")
    try:
        if value is not None:
            return max(0.0, float(value) / 1000)
        value = headers.get("retry-after")
        return None if value is None else max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(str(value)).timestamp() - now)
    except ValueError:
        return None
