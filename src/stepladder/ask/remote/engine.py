"""The engine: many requests to a priced model, as fast as its servers allow, inside a budget, losing nothing.

Every request passes the same gate in the same order: look up, reserve the worst case, send, commit the bytes and
settle, and only then read the answer. A request is a job on one of two queues (ready, or to be tried later); a job
becomes a task when an endpoint has room; a task makes one attempt and ends, and its outcome decides what the job does.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from stepladder.ask.ledger import CHUNK, Grant, Ledger, Scope
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.outcome import FINAL, Outcome, judge
from stepladder.ask.remote.listener import NOBODY, Listener
from stepladder.ask.remote.servers import LOOK, Endpoint, Servers
from stepladder.ask.remote.tally import Tally, no_answers, over_budget
from stepladder.ask.remote.teacher import PricedModel
from stepladder.ask.request import Request, Response, with_cap, worst_case
from stepladder.errors import AskError
from stepladder.workspace import digest

TRIES = 5
"""Attempts at a request whose answers keep getting lost or cannot be read."""
PATIENCE = 50
"""Times a request may be throttled."""
BACKOFF = 0.5
"""Seconds before the second try; doubles with each further one, give or take a half."""
RIVAL_WAIT = 0.25
"""Seconds before looking again at a request that another process is asking."""


class Job(NamedTuple):
    """A request on its way: how often it was tried, how often it was throttled, whether its cap was doubled."""

    request: Request
    tries: int = 0
    waits: int = 0
    doubled: bool = False


async def ask_all(
    requests: Iterable[Request],
    model: PricedModel,
    ledger: Ledger,
    scope: Scope,
    listener: Listener = NOBODY,
) -> Tally:
    """Answer every request; the answers are in the ledger, for the requests may be more than memory holds.

    Cancelled, it sends nothing more, waits for what is in flight, and commits that first.

    Raises:
        BudgetError, AskError: see :func:`stepladder.ask.ask_remote`.
    """
    async with Committer(ledger) as committer:
        round_ = _Round(iter(requests), model, committer, scope, listener)
        await round_.run()
    return round_.finish()


class _Round:
    """One call of :func:`ask_all`."""

    def __init__(
        self,
        source: Iterator[Request],
        model: PricedModel,
        committer: Committer,
        scope: Scope,
        listener: Listener,
    ) -> None:
        self.source, self.model, self.committer, self.scope = source, model, committer, scope
        self.report = listener.report
        self.changed = asyncio.Event()
        self.servers = Servers(model.servers, committer, listener.note, self.changed.set)
        self.tally = Tally()
        self.ready: deque[Job] = deque()
        self.later: list[tuple[float, int, Job]] = []
        self.numbers = itertools.count()
        self.tasks: set[asyncio.Task[None]] = set()
        self.wanted: dict[str, int] = {}  # the largest cap asked for, of requests that are on a queue or in flight
        self.given_up: set[str] = set()
        self.exhausted = False
        self.fatal: str | None = None
        self.error: BaseException | None = None  # a bug, or a ledger that cannot be written
        self.allowance: int | None = None  # once a reservation did not fit: one new try per settled attempt
        self.broke = False
        self.rest = (0, 0)  # requests that the budget left over, and what they would cost at worst

    async def run(self) -> None:
        try:
            while self.fatal is None and self.error is None and not self.broke:
                self.changed.clear()
                await self._refill()
                if not (self.ready or self.later or self.tasks):
                    return
                self.servers.look_around()
                if self.servers.hopeless and not self.tasks:
                    self.fatal = self.servers.hopeless
                    return
                pause = self._launch()
                pause = LOOK if pause is None else min(pause, LOOK)
                # Not wait_for, which in Python 3.11 loses an interrupt that comes with an answer.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self.changed.wait()
        finally:
            # What is in flight is paid for: it is waited for and kept, also when the user interrupts.
            if self.tasks:
                await asyncio.wait(self.tasks)
            await self.servers.close()
        if self.broke:
            self.rest = await self._count_rest()
        if self.error is not None:
            raise self.error

    async def _refill(self) -> None:
        """Keep enough jobs ready: what is due again, then new requests that the ledger cannot answer."""
        now = time.monotonic()
        while self.later and self.later[0][0] <= now:
            self.ready.append(heapq.heappop(self.later)[2])
        while not self.exhausted and len(self.ready) < CHUNK:
            requests, known = await self._take()
            self.exhausted = len(requests) < CHUNK
            for request in requests:
                key = request.key
                if key in known and known[key].settles(request):
                    self.tally.stored += 1
                elif key in known and key not in self.wanted:  # cut off, and the run ended before the second chance
                    self.wanted[key] = 2 * request.max_tokens
                    self.ready.append(Job(with_cap(request, 2 * request.max_tokens), doubled=True))
                elif key in self.given_up:
                    continue
                elif key in self.wanted:  # identical requests are one
                    self.wanted[key] = max(self.wanted[key], request.max_tokens)
                else:
                    self.wanted[key] = request.max_tokens
                    self.ready.append(Job(request))
            self._tell()

    async def _take(self) -> tuple[list[Request], dict[str, Response]]:
        """The next requests of the source, and what the ledger knows of them."""
        requests = list(itertools.islice(self.source, CHUNK))
        return requests, await self.committer.read(lambda ledger: ledger.find_all(requests))

    def _launch(self) -> float | None:
        """Send what may go now; returns the seconds until more may, or None when only an answer can change that."""
        if self.allowance == 0 and not self.tasks:
            self.broke = True
            return 0.0
        now = time.monotonic()
        while self.ready and self.allowance != 0:
            request = self.ready[0].request
            tokens = request.prompt_bound // 4 + request.max_tokens
            waits = [(endpoint.gate.wait(tokens, now), endpoint) for endpoint in self.servers.admitted]
            open_now = [endpoint for wait, endpoint in waits if wait == 0]
            if not open_now:
                return min((wait for wait, _ in waits if wait is not None), default=LOOK)
            endpoint = max(open_now, key=lambda endpoint: endpoint.gate.limit - endpoint.gate.in_flight)
            endpoint.gate.enter(tokens, now)
            if self.allowance is not None:
                self.allowance -= 1
            task = asyncio.create_task(self._attempt(self.ready.popleft(), endpoint, now))
            self.tasks.add(task)
            task.add_done_callback(self._landed)
        return max(0.0, self.later[0][0] - now) if self.later and self.allowance != 0 else None

    def _landed(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.error = error

    async def _attempt(self, job: Job, endpoint: Endpoint, entered: float) -> None:
        """Reserve, send, commit, settle; then let the outcome decide."""
        request, scope = job.request, self.scope
        price = self.model.price
        grant = await self.committer.write(
            lambda ledger: ledger.reserve(request, price, scope, self.model.name, endpoint.name)
        )
        if not isinstance(grant, Grant):
            endpoint.gate.turn_back()
            if grant == "over_budget":
                self.allowance = 0
                self.ready.appendleft(job)
            elif grant == "busy":
                self._again(job, RIVAL_WAIT)
            else:
                self.tally.stored += 1
                self._finish(job)
            return
        self.tally.micro_dollars += grant.reserved
        started = time.monotonic()
        delivery = await self.servers.connection(endpoint).send(request, _idempotency_key(request, grant))
        now = time.monotonic()
        outcome = judge(request, delivery, price)
        await self.committer.write(
            lambda ledger: ledger.settle(grant, request, scope, delivery, outcome, now - started)
        )
        if outcome.charge is not None:
            self.tally.micro_dollars += outcome.charge - grant.reserved
        if self.allowance is not None:
            self.allowance += 1
        endpoint.gate.leave(outcome.kind, entered, now, outcome.retry_after, delivery.headers)
        if not delivery.sent:
            endpoint.gate.shut(now)
            self.servers.lost(endpoint)
            if job.tries + 1 >= TRIES and not self.tally.answered:
                self.fatal = self.fatal or f"{endpoint.name} cannot be reached ({outcome.message})"
        self._decide(job, outcome)

    def _decide(self, job: Job, outcome: Outcome) -> None:
        """What becomes of a request after an attempt."""
        request = job.request
        if outcome.kind == "truncated":
            wanted = self.wanted[request.key]
            if wanted > request.max_tokens:
                self.ready.append(Job(with_cap(request, wanted), doubled=job.doubled))
                return
            if not job.doubled and not request.final:
                self.ready.append(Job(with_cap(request, 2 * request.max_tokens), doubled=True))
                return
        if outcome.kind in FINAL:
            self.tally.answered += 1
            self._finish(job)
        elif outcome.kind == "fatal" or (outcome.kind == "rejected" and not self.tally.answered):
            self.fatal = self.fatal or outcome.message
        elif outcome.kind == "rejected":
            self._give_up(job, outcome)
        elif outcome.kind == "rate_limited":
            if job.waits + 1 >= PATIENCE:
                self._give_up(job, outcome)
            else:
                self.ready.appendleft(job._replace(waits=job.waits + 1))
        elif job.tries + 1 >= TRIES:
            self._give_up(job, outcome)
        else:
            jitter = random.Random(f"{request.key}/{job.tries}").uniform(0.5, 1.5)
            self._again(
                job._replace(tries=job.tries + 1), max(BACKOFF * 2**job.tries * jitter, outcome.retry_after or 0)
            )

    def _again(self, job: Job, wait: float) -> None:
        heapq.heappush(self.later, (time.monotonic() + wait, next(self.numbers), job))

    def _give_up(self, job: Job, outcome: Outcome) -> None:
        self.tally.failed.append(outcome.message)
        self.given_up.add(job.request.key)
        self._finish(job)

    def _finish(self, job: Job) -> None:
        del self.wanted[job.request.key]
        self._tell()

    def _tell(self) -> None:
        tally = self.tally
        self.report(tally.stored + tally.answered + len(tally.failed), tally.micro_dollars)

    def finish(self) -> Tally:
        """The tally, or what went wrong as one line."""
        tally, name = self.tally, self.model.name
        if self.fatal is not None:
            raise AskError(f"model {name!r}: {self.fatal}; nothing more was sent, and what was answered is kept")
        if self.broke:
            raise over_budget(name, self.scope, tally, *self.rest)
        if tally.failed:
            raise no_answers(name, tally.failed)
        return tally

    def _worst(self, request: Request) -> int:
        return worst_case(request, self.model.price)

    async def _count_rest(self) -> tuple[int, int]:
        """How many requests the ledger still cannot answer, and the most they would cost."""
        left = {job.request.key: self._worst(job.request) for job in (*self.ready, *(job for *_, job in self.later))}
        while (chunk := await self._take())[0]:
            requests, known = chunk
            left |= {
                request.key: self._worst(request)
                for request in requests
                if request.key not in known and request.key not in left
            }
        return len(left), sum(left.values())


def _idempotency_key(request: Request, grant: Grant) -> str:
    """The same for every retry that follows no answer, so that a server which keeps such keys bills one of them."""
    return digest([request.key, request.max_tokens, grant.answers_before])
