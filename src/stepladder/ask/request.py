"""A chat request, its identity, its worst-case cost, and its response."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from stepladder.config import Price
from stepladder.records import Message, Record
from stepladder.text import nfkc_bytes
from stepladder.workspace import canonical, digest

KEY_VERSION = "v1"

TEMPLATE_TOKENS = 256
"""Upper bound on what a server's chat template adds once (a default system prompt, a date line, opening tokens)."""
MESSAGE_TOKENS = 16
"""Upper bound on what it adds around each message."""
ANSWER_SLACK_TOKENS = 16
"""Upper bound on what a server counts beside an answer that fills its cap, such as an end token."""
REPLY_BYTES, TOKEN_BYTES = 65_536, 1_024
"""Upper bounds on the JSON of a reply around its tokens, and on that of one token or of one alternative to it."""

MIN_LOGPROB, MAX_LOGPROB = -10_000.0, 0.01
"""vLLM writes -9999 for impossible tokens; rounding may lift a certain one a little above 0."""

Finish = Literal["stop", "length", "filtered", "refused"]
"""``stop``: complete; ``length``: truncated at ``max_tokens``; ``filtered``: withheld by the provider's content filter;
``refused``: the provider does not accept this prompt (too long, not allowed), so it is not sent again."""


class TokenLogprob(NamedTuple):
    """One token of a response with its log-probability (natural logarithm)."""

    token: str
    logprob: float
    top: dict[str, float]
    """Log-probabilities of the ``top_logprobs`` most likely tokens at this position, most likely first."""


def is_logprob(value: object) -> bool:
    """Whether a value can be a log-probability; NaN cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and MIN_LOGPROB <= value <= MAX_LOGPROB


class Request(Record):
    """One chat request to one model.

    ``model`` identifies the model independently of its name in the configuration: base URL and model name of an API;
    the hash of local weights, so that several servers of the same weights share answers.
    ``sample_index`` distinguishes repeated samples of the same question; sampling in this process is seeded by it.
    ``max_tokens`` limits the length of the answer. ``top_logprobs`` asks for the log-probability of each token and
    of so many of the most likely tokens at its position.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    sample_index: int = 0
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int
    final: bool = False
    """Whether a truncated answer is kept, as it is with weights in this process. Otherwise the request is sent once
    more with twice ``max_tokens``."""
    prompt_token_ids: tuple[int, ...] | None = None
    """The messages as the tokenizer of the model's weights renders them, for servers that take token ids."""

    def identity(self) -> str:
        """Canonical JSON of everything that determines the answer. Left out are ``max_tokens`` and ``final``, so that a
        finished answer serves any cap; the token ids, which follow from the messages; and settings that are not set, so
        that keys stay the same when a setting is added to this class."""
        left_out = {"max_tokens", "final", "prompt_token_ids"}
        return canonical(self.model_dump(mode="json", exclude=left_out, exclude_none=True))

    @property
    def sampling(self) -> dict[str, float | int]:
        """How the answer is sampled, by the names that servers give the settings; those that are not set are left
        out."""
        settings = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return {name: value for name, value in settings.items() if value is not None}

    @functools.cached_property
    def key(self) -> str:
        """The request's key in the ledger: a version, and the SHA-256 of its identity."""
        return f"{KEY_VERSION}:{hashlib.sha256(self.identity().encode()).hexdigest()}"

    @functools.cached_property
    def prompt_bound(self) -> int:
        """:func:`prompt_bound` of its messages, computed once."""
        return prompt_bound(self.messages)

    @property
    def answer_bound(self) -> int:
        """The most tokens that a server may count for an answer up to its cap."""
        return self.max_tokens + ANSWER_SLACK_TOKENS

    @property
    def reply_bound(self) -> int:
        """The most bytes that a server's reply may have: text, reasoning, and log-probabilities where they are asked
        for."""
        return REPLY_BYTES + self.answer_bound * TOKEN_BYTES * (2 + 2 * (self.top_logprobs or 0))


class Response(Record):
    """The answer to a request, as the ledger stores it."""

    text: str
    finish: Finish = "stop"
    max_tokens: int
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    """The reasoning of a reasoning model, where its provider returns it."""
    micro_dollars: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry a token, if the request asked for them."""

    @property
    def finished(self) -> bool:
        """False if the answer was truncated at ``max_tokens``."""
        return self.finish != "length"

    def settles(self, request: Request) -> bool:
        """Whether the request need not be sent again: the answer is finished, or was truncated at twice the request's
        cap as well (at its own cap, if the request is final)."""
        return self.finished or self.max_tokens >= (1 if request.final else 2) * request.max_tokens

    def serves(self, request: Request) -> bool:
        """Whether this answer can be returned for the request: a finished one always, a truncated one only if the
        request's cap is no larger than its own."""
        return self.finished or request.max_tokens <= self.max_tokens


def with_cap(request: Request, max_tokens: int) -> Request:
    """The request with another ``max_tokens``."""
    return request.model_copy(update={"max_tokens": max_tokens})


def idempotency_key(request: Request, answers_before: int) -> str:
    """The same for all attempts without an answer in between, so that a server which supports it bills only one."""
    return digest([request.key, request.max_tokens, answers_before])


def worst_case(request: Request, price: Price) -> int:
    """The most the request can cost, in micro-dollars: its longest possible prompt, and an answer up to its cap, as
    generously as a server may count it."""
    return price.of(request.prompt_bound, request.answer_bound)


def prompt_bound(messages: Sequence[Message]) -> int:
    """An upper bound on the tokens of these messages, whatever the tokenizer.

    Today's tokenizers fall back to bytes for unknown text, so a text never has more tokens than UTF-8 bytes; some
    normalise it first (NFKC), which may lengthen it. A control token in it is broken up by a space. What the chat
    template adds is bounded by constants.
    """
    sizes = (max(len(m.content.encode()), nfkc_bytes(m.content)) for m in messages)
    spaces = sum(m.content.count("<") + m.content.count("[") for m in messages)
    return TEMPLATE_TOKENS + spaces + sum(size + MESSAGE_TOKENS for size in sizes)
