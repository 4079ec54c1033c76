"""The queues of a call of the engine: requests that may be sent now, and those that wait for a while."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from stepladder.ask.ledger import CHUNK
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.remote.gate import MAX_PAUSE_SECONDS
from stepladder.ask.remote.waiting import SILENCE_SECONDS, Wait
from stepladder.ask.request import Request, Response, with_cap

BACKOFF_SECONDS = 0.5
"""Before the second attempt; doubles with each further one, with a jitter of 50 %."""


class Job(NamedTuple):
    """A request in work: its failed and its throttled attempts, and whether its cap has been doubled."""

    request: Request
    failures: int = 0
    throttled: int = 0
    doubled: bool = False


class Delayed(NamedTuple):
    """A job that waits until it is due, on the monotonic clock; ``what`` says what for."""

    due: float
    tiebreak: int
    job: Job
    what: str


class Jobs:
    """The requests of a source that the ledger cannot answer.

    Args:
        source: the requests; it is read as the queue empties.
        committer: of the ledger.
        on_stored: called with how many further requests the ledger answers.
    """

    def __init__(self, source: Iterator[Request], committer: Committer, on_stored: Callable[[int], None]) -> None:
        self._source, self._committer, self._on_stored = source, committer, on_stored
        self.ready: deque[Job] = deque()
        self.delayed: list[Delayed] = []  # a heap by due time
        self.largest_caps: dict[str, int] = {}  # by key, of requests in a queue or in flight
        self._tiebreaks = itertools.count()
        self._given_up: set[str] = set()
        self._source_exhausted = False

    def __bool__(self) -> bool:
        return bool(self.ready or self.delayed)

    async def refill(self) -> None:
        """Fill the ready queue with delayed jobs that are due, then with new requests that the ledger cannot answer."""
        now_seconds = time.monotonic()
        while self.delayed and self.delayed[0].due <= now_seconds:
            self.ready.append(heapq.heappop(self.delayed).job)
        while not self._source_exhausted and len(self.ready) < CHUNK:
            requests, responses = await self._next_chunk()
            self._source_exhausted = len(requests) < CHUNK
            self._on_stored(sum(self._is_answered(request, responses.get(request.key)) for request in requests))

    def _is_answered(self, request: Request, response: Response | None) -> bool:
        """Whether the ledger answers the request; otherwise it is in a queue now, or has been given up."""
        key = request.key
        if response is not None and response.settles(request):
            return True
        if response is not None and key not in self.largest_caps:  # truncated in an earlier run
            self.largest_caps[key] = 2 * request.max_tokens
            self.ready.append(Job(with_cap(request, 2 * request.max_tokens), doubled=True))
        elif key in self._given_up:
            pass
        elif key in self.largest_caps:  # a duplicate
            self.largest_caps[key] = max(self.largest_caps[key], request.max_tokens)
        else:
            self.largest_caps[key] = request.max_tokens
            self.ready.append(Job(request))
        return False

    async def _next_chunk(self) -> tuple[list[Request], dict[str, Response]]:
        """The next requests of the source, and their responses in the ledger by key."""
        requests = list(itertools.islice(self._source, CHUNK))
        return requests, await self._committer.read(lambda ledger: ledger.find_all(requests))

    def delay(self, job: Job, seconds: float, what: str) -> None:
        """Put a job back into the ready queue after so many seconds; ``what`` says what is waited for."""
        heapq.heappush(self.delayed, Delayed(time.monotonic() + seconds, next(self._tiebreaks), job, what))

    def retry_later(self, job: Job, retry_after: float, message: str) -> None:
        """Try a job that has failed again later: after so many seconds, if the server named them, and no earlier than
        its number of failures demands. ``message`` is what failed."""
        jitter = random.Random(f"{job.request.key}/{job.failures}").uniform(0.5, 1.5)
        seconds = max(BACKOFF_SECONDS * 2**job.failures * jitter, min(retry_after, MAX_PAUSE_SECONDS))
        failed = job._replace(failures=job.failures + 1)
        self.delay(failed, seconds, f"the next try of requests that failed ({message})")

    def finish(self, job: Job, *, given_up: bool = False) -> None:
        """Forget a job; one that is given up is not asked again if the source repeats it."""
        del self.largest_caps[job.request.key]
        if given_up:
            self._given_up.add(job.request.key)

    def seconds_until_due(self, now_seconds: float) -> float | None:
        """Seconds until the first of the delayed jobs is due; None where there is none."""
        return max(0.0, self.delayed[0].due - now_seconds) if self.delayed else None

    def awaited(self) -> Wait | None:
        """What the first of the delayed jobs waits for."""
        if not self.delayed:
            return None
        first = self.delayed[0]
        is_long = first.due - time.monotonic() > SILENCE_SECONDS
        return Wait(first.what, first.due if is_long else None, first.what, is_pause=True)

    async def count_unanswered(self, cost: Callable[[Request], int]) -> tuple[int, int]:
        """The number of requests that are not answered, and the sum of their costs."""
        jobs = (*self.ready, *(delayed.job for delayed in self.delayed))
        costs = {job.request.key: cost(job.request) for job in jobs}
        while (chunk := await self._next_chunk())[0]:
            requests, responses = chunk
            costs |= {
                request.key: cost(request)
                for request in requests
                if request.key not in responses and request.key not in costs
            }
        return len(costs), sum(costs.values())
