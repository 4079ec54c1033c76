"""Requests that are in flight at two servers, because the first takes far longer than answers take: whichever answers
first is kept. Otherwise all would wait for one server that hangs.

These are the hedged requests of "The Tail at Scale" (Dean and Barroso, Communications of the ACM 56(2), 2013). They
cost a second answer, so only servers without a price are asked twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field

from stepladder.ask.outcome import Delivery
from stepladder.ask.remote.jobs import Job
from stepladder.ask.remote.servers import Endpoint

MIN_ANSWERS = 20
"""Before it is known how long answers take."""
KNOWN_ANSWERS = 1000
"""The last ones, which tell how long answers take."""
USUAL_SHARE = 0.95
"""Of answers that take as long as is usual, or less."""
SLOW_FACTOR = 3.0
"""Times as long as is usual, and a request is sent again."""
MIN_SECONDS = 2.0
"""Before that, no request is sent again."""


@dataclass(eq=False)
class Race:
    """The attempts at one request that are in flight."""

    job: Job
    endpoint: Endpoint
    """Of the first attempt."""
    started: float
    """Of the first attempt, seconds of the monotonic clock."""
    sending: set[asyncio.Future[Delivery]] = field(default_factory=set)
    """What those wait for that were sent."""
    runners: int = 1
    is_won: bool = False
    """Whether one of them has brought the answer."""

    async def run(self, sending: Awaitable[Delivery]) -> Delivery:
        """Wait for the answer of one attempt, unless another one brings it first."""
        task = asyncio.ensure_future(sending)
        self.sending.add(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled() or not self.is_won:
                task.cancel()
                raise
            return Delivery(error="another server answered first")
        finally:
            self.sending.discard(task)

    def win(self) -> None:
        """Keep the answer that one attempt has brought, and wait for no other."""
        self.is_won = True
        for task in self.sending:
            task.cancel()


class Races:
    """The races of a call of the engine, the oldest first."""

    def __init__(self) -> None:
        self._running: dict[Race, None] = {}
        self._seconds: deque[float] = deque(maxlen=KNOWN_ANSWERS)

    def add(self, race: Race) -> None:
        self._running[race] = None

    def leave(self, race: Race) -> None:
        """Count out an attempt that has ended."""
        race.runners -= 1
        if not race.runners:
            del self._running[race]

    def learn(self, seconds: float) -> None:
        """Count an answer that took so long."""
        self._seconds.append(seconds)

    def slow(self, now_seconds: float) -> list[Race]:
        """Those with one attempt, which takes too long; the oldest first."""
        if len(self._seconds) < MIN_ANSWERS:
            return []
        usual = sorted(self._seconds)[int(USUAL_SHARE * len(self._seconds))]
        latest = now_seconds - max(MIN_SECONDS, SLOW_FACTOR * usual)
        return [race for race in self._running if race.runners == 1 and race.started < latest]
