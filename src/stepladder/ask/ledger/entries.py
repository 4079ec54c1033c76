"""What the ledger keeps and tells: accounts, attempts, batches. Money is integer micro-dollars."""

from __future__ import annotations

from typing import Literal, NamedTuple

from stepladder.config import Price


class Scope(NamedTuple):
    """On whose account a request goes: the run and its rung, with their caps in micro-dollars (None: no cap)."""

    run: str
    rung: str = ""
    run_cap: int | None = None
    rung_cap: int | None = None


class Grant(NamedTuple):
    """Leave to send, and under which attempt."""

    attempt: int
    worst: int
    """Micro-dollars set aside."""
    answers_before: int
    """Responses this request already drew, unusable ones: a retry after none of them may reuse its idempotency key."""


Refusal = Literal["stored", "busy", "broke"]
"""``stored``: somebody answered it meanwhile; ``busy``: another process is asking it now; ``broke``: over a cap."""


class Open(NamedTuple):
    """An attempt without an outcome."""

    attempt: int
    model: str
    reserved: int
    alive: bool
    """Whether the process that sent it still runs; if not, nobody will ever know what became of it."""


class Batch(NamedTuple):
    """Requests handed to a provider in one file, or about to be."""

    id: int
    intent: str
    """What the batch's metadata carries, so that one whose name never arrived can be found."""
    scope: Scope
    """On whose account it goes; without caps, which have been seen to."""
    price: Price
    """At which its lines were reserved, and are charged."""
    remote: str | None
    """The provider's name for it, once known."""
    created: float
    """Seconds since the epoch."""


class Waiting(NamedTuple):
    """A batch that has not ended."""

    remote: str | None
    requests: int
    reserved: int
    """Micro-dollars."""


class Account(NamedTuple):
    """What one run did with one model on one rung."""

    rung: str
    model: str
    micro_dollars: int
    outcomes: dict[str, int]
    """Attempts by outcome, the most frequent first; ``open``: without one."""
    prompt_tokens: int
    completion_tokens: int
    hits: int
    """Requests answered from the ledger."""
    seconds: tuple[float, ...]
    """How long each attempt took, sorted."""
