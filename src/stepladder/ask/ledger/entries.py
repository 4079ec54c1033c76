"""Entries of the ledger: scopes, attempts, batches, accounts. Money is integer micro-dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from stepladder.config import Price


class Scope(NamedTuple):
    """The account of a request: a run and a rung, with their caps in micro-dollars (None: no cap)."""

    run: str
    rung: str = ""
    run_cap: int | None = None
    rung_cap: int | None = None


class Grant(NamedTuple):
    """Permission to send a request."""

    attempt: int
    """Id of the attempt."""
    reserved: int
    """Micro-dollars."""
    answers_before: int
    """Responses with status 200 that earlier attempts at the request got. Part of its idempotency key, so that only
    retries after none of them reuse a key."""


Refusal = Literal["stored", "busy", "over_budget"]
"""Why a request must not be sent. ``stored``: it has been answered meanwhile; ``busy``: another process has sent it;
``over_budget``: its worst case would exceed a cap."""


class UnsettledAttempt(NamedTuple):
    """An attempt without an outcome."""

    attempt: int
    model: str
    reserved: int
    alive: bool
    """Whether the process that sent it still runs; if not, its outcome stays unknown."""


class Batch(NamedTuple):
    """Requests sent to a provider in one file, or about to be."""

    id: int
    intent: str
    """Random id in the batch's metadata, by which a batch is found at the provider whose remote id never arrived."""
    scope: Scope
    """Without caps, which were checked when its attempts were reserved."""
    price: Price
    """Of its attempts."""
    remote: str | None
    """The provider's id, once known."""
    created: float
    """Seconds since the epoch."""


class UnfinishedBatch(NamedTuple):
    """A batch that has not ended."""

    remote: str | None
    requests: int
    reserved: int
    """Micro-dollars."""


class Recent(NamedTuple):
    """What a run's last requests brought."""

    completion_tokens: int
    micro_dollars: int
    failures: Sequence[tuple[str, str, str, float]]
    """Model, outcome, message and age in seconds of the last attempts that brought no answer, the latest first."""


class Account(NamedTuple):
    """What one run asked of one model on one rung."""

    rung: str
    model: str
    micro_dollars: int
    outcomes: dict[str, int]
    """Number of attempts by outcome, most frequent first; ``open``: without an outcome."""
    prompt_tokens: int
    completion_tokens: int
    hits: int
    """Requests answered from the ledger."""
    seconds: Mapping[float, int]
    """How many settled attempts took so long, to three significant digits, the shortest first."""

    def percentile(self, share: float) -> float | None:
        """The duration that so large a share of the settled attempts did not exceed (nearest rank), seconds; None
        without any."""
        left = int(share * sum(self.seconds.values()))
        for seconds, count in self.seconds.items():
            left -= count
            if left < 0:
                return seconds
        return None
