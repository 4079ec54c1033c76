"""The queue of a provider's batch API, which holds so many tokens at once and no more.

OpenAI limits the prompt tokens of a model's batches that have not ended: 90,000 of gpt-4o on an account of the first
tier (platform.openai.com/docs/guides/batch, "Rate limits"; the limits of 2024-11). A batch that does not fit is made,
and fails while it is validated: its only error has the code ``token_limit_exceeded`` and names the limit. Other users
of the account share the queue, so that a batch may not fit although it is within the limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from stepladder.ask.foreign_json import one_line
from stepladder.ask.ledger import Batch
from stepladder.ask.request import Request, Response

FULL_CODE = "token_limit_exceeded"
FULL_MESSAGE = re.compile(r"enqueued (?:tokens?|requests?)", re.IGNORECASE)
LIMIT = re.compile(r"limit(?: of|:)? *(\d[\d,]*+) *([KM]?)\b(?! *enqueued requests)", re.IGNORECASE)
"""In OpenAI's message ("Limit: 90,000 enqueued tokens") and in Azure's ("the configured limit of 30K")."""
UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
MAX_LIMIT_TOKENS = 10**12
MARGIN = 1.1
"""On the estimate of a prompt's tokens."""
MIN_BATCH_SHARE = 0.25
"""Of the queue that must be free for a further batch beside others: many small ones would only be slower."""
GROWTH = 1.5
"""Of what is sent at once, after a batch that was accepted, up to the limit."""


class QueueRefusal(NamedTuple):
    """A batch did not fit into the queue."""

    message: str
    limit_tokens: int | None
    """The queue's, if the message names it."""


def read_refusal(code: object, message: object) -> QueueRefusal | None:
    """What an error of a batch says of the queue; None if it is about something else."""
    text = one_line(message) if isinstance(message, str) else ""
    if code != FULL_CODE and FULL_MESSAGE.search(text) is None:
        return None
    match = LIMIT.search(text)
    limit = int(match[1].replace(",", "")[:15]) * UNITS[match[2].lower()] if match else 0
    return QueueRefusal(text or FULL_CODE, limit if 0 < limit <= MAX_LIMIT_TOKENS else None)


class Enqueued(NamedTuple):
    """A batch at the provider that has not ended."""

    batch: Batch
    keys: frozenset[str]
    """Of its requests."""
    bound: int
    """Sum of the bounds on the tokens of their prompts (:attr:`Request.prompt_bound`)."""


class Queue:
    """This process' batches at the provider, and how much room its queue has for further ones.

    How many tokens there are in a prompt only the provider knows, which has the tokenizer: the estimate is learned from
    its answers, and is the bound before there are any.

    Args:
        limit_tokens: the provider's limit, if it is known; otherwise it is learned from the first refusal.
    """

    def __init__(self, limit_tokens: int | None) -> None:
        self.limit_tokens = limit_tokens
        self.is_full = False
        """Whether the last batch did not fit although it was within the limit: others fill the queue."""
        self._entries: dict[int, Enqueued] = {}  # by the batch's id in the ledger
        self._accepted: set[int] = set()
        self._window_tokens = math.inf if limit_tokens is None else float(limit_tokens)  # that are tried at once
        self._tokens_per_bound = 1.0

    @property
    def entries(self) -> tuple[Enqueued, ...]:
        """The batches that have not ended."""
        return tuple(self._entries.values())

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the requests in them."""
        return frozenset[str]().union(*(entry.keys for entry in self.entries))

    def measure(self, answered: Iterable[tuple[Request, Response]]) -> None:
        """Learn from answers how many tokens the provider counts."""
        pairs = [(request.prompt_bound, response.prompt_tokens) for request, response in answered]
        bound = sum(bound for bound, tokens in pairs if tokens)
        if bound:
            self._tokens_per_bound = min(1.0, MARGIN * sum(tokens for _, tokens in pairs) / bound)

    def has_room(self, request: Request, batch_bound: int = 0) -> bool:
        """Whether a request fits into a new batch with those of ``batch_bound``. A batch that the provider has not yet
        accepted is waited for; and a first request always fits into a queue that holds nothing of this process."""
        if self.is_full or self._entries.keys() - self._accepted:
            return False
        if not self._entries and not batch_bound:
            return True
        free = self._window_tokens - self._tokens(self._enqueued_bound)
        if self._entries and free < MIN_BATCH_SHARE * self._window_tokens:
            return False
        return self._tokens(batch_bound + request.prompt_bound) <= free

    def enter(self, entry: Enqueued) -> None:
        """A batch was made."""
        self._entries[entry.batch.id] = entry

    def accept(self, entry: Enqueued) -> bool:
        """A batch fitted; whether that is news."""
        if entry.batch.id in self._accepted:
            return False
        self._accepted.add(entry.batch.id)
        self._window_tokens = min(GROWTH * self._window_tokens, self.limit_tokens or math.inf)
        return True

    def leave(self, entry: Enqueued) -> None:
        """A batch ended and makes room."""
        del self._entries[entry.batch.id]
        self.is_full = False

    def refuse(self, entry: Enqueued, refusal: QueueRefusal) -> None:
        """A batch did not fit."""
        self._entries.pop(entry.batch.id, None)
        self.limit_tokens = refusal.limit_tokens or self.limit_tokens
        tried, limit = self._tokens(self._enqueued_bound + entry.bound), float(refusal.limit_tokens or math.inf)
        window = limit if tried > limit else tried / 2
        # Otherwise only its size was at fault.
        self.is_full = tried <= limit or window >= self._window_tokens
        self._window_tokens = window

    @property
    def _enqueued_bound(self) -> int:
        return sum(entry.bound for entry in self.entries)

    def _tokens(self, bound: int) -> float:
        """Estimate of the tokens of prompts with this bound."""
        return bound * self._tokens_per_bound
