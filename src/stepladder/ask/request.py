"""A chat request, its identity, what it may cost at worst, and what came back."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from stepladder.config import Price
from stepladder.records import Message, Record
from stepladder.workspace import canonical

KEY_VERSION = "v1"

TEMPLATE_TOKENS = 256
"""Room for what a server's chat template adds once (a default system prompt, a date line, opening tokens)."""
MESSAGE_TOKENS = 16
"""Room for what it adds around each message."""

Finish = Literal["stop", "length", "filtered", "refused"]
"""``stop``: a whole answer; ``length``: cut off at the cap; ``filtered``: withheld by the provider's content filter;
``refused``: the provider will not take this prompt (too long, not allowed), so asking again is pointless."""


class TokenLogprob(NamedTuple):
    """One token of an answer and how likely it was; natural logarithms."""

    token: str
    logprob: float
    top: dict[str, float]
    """The likeliest tokens at its place, as many as were asked for, the likeliest first."""


class Request(Record):
    """One question to one model.

    ``model`` says who is asked in a way that outlives names: base URL and model name of an API; for own weights the
    hash of their content, so that several servers of the same weights share answers.
    ``sample_index`` tells repeated samples of the same question apart; weights in this process are seeded by it.
    ``max_tokens`` caps the answer's length. ``top_logprobs`` asks for each token's log-probability and for so many of
    the likeliest tokens at its place.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float = 0.0
    top_p: float | None = None
    sample_index: int = 0
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int
    final: bool = False
    """Whether a cut-off answer stands, as it does with weights in this process; otherwise it is asked for once more
    with twice the cap."""

    def identity(self) -> str:
        """Canonical JSON of everything that makes the answer. ``max_tokens`` and ``final`` are left out, so that a
        finished answer serves any cap; so are settings that are not set, so that a new kind of setting changes no old
        key."""
        return canonical(self.model_dump(mode="json", exclude={"max_tokens", "final"}, exclude_none=True))

    @functools.cached_property
    def key(self) -> str:
        """The request's name in the ledger: a version, and the SHA-256 of its identity."""
        return f"{KEY_VERSION}:{hashlib.sha256(self.identity().encode()).hexdigest()}"

    @functools.cached_property
    def prompt_bound(self) -> int:
        """:func:`prompt_bound` of its messages, counted once."""
        return prompt_bound(self.messages)


class Response(Record):
    """What came back, as the ledger holds it."""

    text: str
    finish: Finish = "stop"
    max_tokens: int
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    """What a reasoning model thought aloud, where its provider shows it."""
    micro_dollars: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry per token, where they were asked for."""

    @property
    def finished(self) -> bool:
        """False: cut off at ``max_tokens``."""
        return self.finish != "length"

    def settles(self, request: Request) -> bool:
        """Whether nothing more is to be bought for the request: it is answered, or was cut off at twice its cap too (a
        final one at its own)."""
        return self.finished or self.max_tokens >= (1 if request.final else 2) * request.max_tokens

    def serves(self, request: Request) -> bool:
        """Whether this answer can stand for the request: a finished one always, a cut one only up to its own cap."""
        return self.finished or request.max_tokens <= self.max_tokens


def with_cap(request: Request, max_tokens: int) -> Request:
    """The same request with another cap."""
    return request.model_copy(update={"max_tokens": max_tokens})


def worst_case(request: Request, price: Price) -> int:
    """Micro-dollars that the request cannot exceed: its longest possible prompt and an answer up to its cap."""
    return price.of(request.prompt_bound, request.max_tokens)


def prompt_bound(messages: Sequence[Message]) -> int:
    """A number of tokens that no tokenizer exceeds on these messages.

    Tokenizers of today fall back to bytes for what they do not know, so a text never has more tokens than UTF-8 bytes;
    some normalise first (NFKC), which may lengthen it. What the chat template adds is bounded by constants.
    """
    sizes = (max(_bytes(m.content), _bytes(unicodedata.normalize("NFKC", m.content))) for m in messages)
    return TEMPLATE_TOKENS + sum(size + MESSAGE_TOKENS for size in sizes)


def _bytes(text: str) -> int:
    return len(text.encode())
