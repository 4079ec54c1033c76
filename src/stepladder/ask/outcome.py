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
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from stepladder.ask.foreign_json import one_line, read_json
from stepladder.ask.request import Finish, Request, Response, TokenLogprob, is_logprob, worst_case
from stepladder.config import Price
from stepladder.text import well_formed

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
MAX_RETRY_AFTER_SECONDS = 3600.0
"""A server that asks for a longer wait is asked again after this one."""
SHOWN_BYTES = 120
"""Of a reply that cannot be read."""
MAX_TOP_LOGPROBS = 32
"""Of one position; requests ask for 20 at most."""


class Delivery(NamedTuple):
    """What one attempt returned: a complete HTTP response, or the error instead of one."""

    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = {}
    error: str = ""
    """Why there is no response, or why its body is not what the server sent: longer than the limit, or packed in an
    unknown way."""
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
    """Classify a delivery and compute its charge. Never raises, whatever the bytes are; what it returns is finite, in
    range, and can be stored: nothing behind it need look at a server's values again. ``timestamp`` is when the
    delivery came, in seconds since the epoch, by default now."""
    status = delivery.status
    if status is None:
        return (
            Outcome("lost", None, message=delivery.error) if delivery.sent else _uncharged("transient", delivery.error)
        )
    if status == 200:
        return _parse_answer(request, delivery, price)
    if 300 <= status < 400:
        return _uncharged("fatal", redirect_message(status, delivery.headers))
    message, code = parse_error(delivery.body)
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
        body, choice, text, reasoning, finish = _read_choice(delivery)
    except UnreadableError as error:
        message = f"HTTP 200 that cannot be read: {error}; {_described(delivery)}"
        return Outcome("malformed", None, message=message)
    usage, doubt = _parse_usage(request, body, empty=not (text or reasoning))
    charge = None if usage is None else price.of(*usage)
    prompt_tokens, completion_tokens = usage or (0, 0)
    response = Response(
        text=well_formed(text),
        finish=finish,
        max_tokens=request.max_tokens,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        reasoning=well_formed(reasoning),
        micro_dollars=worst_case(request, price) if charge is None else charge,
        logprobs=_parse_logprobs(request, choice),
    )
    return Outcome(KINDS[finish], charge, response, doubt)


class UnreadableError(Exception):
    """A reply is no answer; the message says what is wrong with it."""


def _read_choice(delivery: Delivery) -> tuple[Any, Any, str, str, Finish]:
    """The parsed body of a response with status 200, its first choice, and text, reasoning and finish of that.

    Raises:
        UnreadableError: it is no answer to a chat request.
    """
    if delivery.error:
        raise UnreadableError(one_line(delivery.error))
    try:
        body = read_json(delivery.body)
    except ValueError:
        raise UnreadableError("it is no JSON") from None
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    except (LookupError, TypeError, AttributeError):
        raise UnreadableError("it has no message in choices[0]") from None
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise UnreadableError("the content of its message is no text")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in FINISHES:
        shown = repr(one_line(reason)) if isinstance(reason, str) else "missing"
        raise UnreadableError(f"its finish_reason is {shown}, where {', '.join(FINISHES)} are known")
    return body, choice, text, reasoning, FINISHES[reason]


def _described(delivery: Delivery) -> str:
    """The content type and the first bytes of a reply."""
    kind = one_line(delivery.headers.get("content-type", "")) or "without a content type"
    if not delivery.body:
        return f"{kind}, an empty body"
    return f"{kind}, begins {one_line(delivery.body[:SHOWN_BYTES].decode(errors='replace'))!r}"


def _parse_logprobs(request: Request, choice: Any) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the answer's tokens; empty if the request asked for none, or if one of them cannot be, since
    the answer is usable without."""
    if request.top_logprobs is None:
        return ()
    try:
        tokens = (choice.get("logprobs") or {}).get("content") or ()
        if len(tokens) > request.answer_bound:
            return ()
        return tuple(_parse_logprob(token) for token in tokens)
    except (LookupError, TypeError, ValueError, AttributeError):
        return ()


def _parse_logprob(token: Any) -> TokenLogprob:
    """Raises an error of parsing if a value is missing, of another type, or out of range."""
    top = token.get("top_logprobs") or ()
    if len(top) > MAX_TOP_LOGPROBS:
        raise ValueError("more alternatives than were asked for")
    alternatives = {well_formed(other["token"]): _logprob(other["logprob"]) for other in top}
    return TokenLogprob(well_formed(token["token"]), _logprob(token["logprob"]), alternatives)


def _logprob(value: Any) -> float:
    if not is_logprob(value):
        raise ValueError("no log-probability")
    return float(value)


def _parse_usage(request: Request, body: Any, *, empty: bool) -> tuple[tuple[int, int] | None, str]:
    """Prompt and completion tokens as the server reports them; if the report is missing or cannot be true, None and a
    message that says so."""
    try:
        prompt, completion = body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError):
        return None, "charged at the worst case: the server does not say how many tokens it counted"
    if type(prompt) is int and type(completion) is int:
        minimum = 0 if empty else 1
        if 0 < prompt <= request.prompt_bound and minimum <= completion <= request.answer_bound:
            return (prompt, completion), ""
    counted = one_line(f"{_shortened(prompt)} and {_shortened(completion)}")
    return None, (
        f"charged at the worst case: the server counted {counted} tokens of prompt and answer, where at most "
        f"{request.prompt_bound} and {request.answer_bound} are possible"
    )


def _shortened(value: Any) -> str:
    """A reported count as a message shows it."""
    if type(value) is int:
        return str(value) if abs(value) < 10**12 else "over 10^12"
    return type(value).__name__


def parse_error(body: bytes) -> tuple[str, str]:
    """Message and code of an OpenAI-style error body; of any other body its beginning, and no code."""
    try:
        error = read_json(body)["error"]
        message, code = error["message"], error.get("code") or error.get("type") or ""
        if isinstance(message, str):
            return one_line(message), one_line(str(code)) if type(code) in (str, int) else ""
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return one_line(body[:200].decode(errors="replace")) or "no message", ""


def redirect_message(status: int, headers: Mapping[str, str]) -> str:
    """What to say of a redirect: following it would send question and key to an address that nobody has named."""
    target = one_line(headers.get("location", "")) or "an address it does not name"
    return f"HTTP {status}: it redirects to {target}, which is not followed; if that is the model's, set base_url to it"


def retry_after(headers: Mapping[str, str], timestamp: float) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3): between 0 and
    MAX_RETRY_AFTER_SECONDS. None without such a header, or if it holds neither. ``timestamp`` is when it came, in
    seconds since the epoch."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif value is not None:
            seconds = float(value)
        else:
            return None
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(value)).timestamp() - timestamp
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)
