"""The engine: sends many requests to a priced model, as fast as its servers allow and within a budget.

Every request takes the same steps: look it up in the ledger, reserve its worst case, send it, commit the raw response
and settle, and only then use the answer. A request is a job in one of two queues (ready, or delayed). When an endpoint
has room, a task makes one attempt at the job and ends; the outcome decides whether the job returns to a queue.
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
from stepladder.ask.remote.listener import NO_LISTENER, Listener
from stepladder.ask.remote.servers import REFRESH_SECONDS, Endpoint, Servers
from stepladder.ask.remote.tally import Tally, budget_error, unanswered_error
from stepladder.ask.remote.teacher import PricedModel
from stepladder.ask.request import Request, Response, with_cap, worst_case
from stepladder.errors import AskError
from stepladder.workspace import digest

MAX_ATTEMPTS = 5
"""At one request, throttled ones not counted."""
MAX_THROTTLED = 50
"""Throttled attempts at one request."""
BACKOFF_SECONDS = 0.5
"""Before the second attempt; doubles with each further one, with a jitter of 50 %."""
BUSY_WAIT_SECONDS = 0.25
"""Before a request that another process has sent is looked up again."""


class Job(NamedTuple):
    """A request in work: its failed and its throttled attempts, and whether its cap has been doubled."""

    request: Request
    failures: int = 0
    throttled: int = 0
    doubled: bool = False


async def ask_all(
    requests: Iterable[Request],
    model: PricedModel,
    ledger: Ledger,
    scope: Scope,
    listener: Listener = NO_LISTENER,
) -> Tally:
    """Answer every request. The answers are in the ledger, since they may not fit in memory.

    When cancelled, it sends nothing more, but waits for the requests in flight and commits their answers.

    Raises:
        BudgetError, AskError, LedgerError: see :func:`stepladder.ask.ask_remote`.
    """
    async with Committer(ledger, listener.note) as committer:
        call = _Call(iter(requests), model, committer, scope, listener)
        await call.run()
    return call.finish()


class _Call:
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
        self.report, self.note = listener
        self.changed = asyncio.Event()
        self.servers = Servers(model.servers, committer, listener.note, self.changed.set)
        self.tally = Tally()
        self.ready: deque[Job] = deque()
        self.delayed: list[tuple[float, int, Job]] = []  # a heap by due time
        self.tiebreaks = itertools.count()
        self.tasks: set[asyncio.Task[None]] = set()
        self.largest_caps: dict[str, int] = {}  # by key, of requests in a queue or in flight
        self.given_up: set[str] = set()
        self.source_exhausted = False
        self.fatal_message: str | None = None
        self.exception: BaseException | None = None  # a bug, or a ledger that cannot be written
        self.attempts_left: int | None = None  # limited once a reservation exceeded a cap: one for each settled attempt
        self.cap_reached = False
        self.unanswered = (0, 0)  # once a cap is reached: remaining requests, and the most they would cost

    async def run(self) -> None:
        try:
            while self.fatal_message is None and self.exception is None and not self.cap_reached:
                self.changed.clear()
                await self._refill()
                if not (self.ready or self.delayed or self.tasks):
                    return
                self.servers.refresh()
                if self.servers.rejection and not self.tasks:
                    self.fatal_message = self.servers.rejection
                    return
                pause = self._launch()
                pause = REFRESH_SECONDS if pause is None else min(pause, REFRESH_SECONDS)
                # Not wait_for, which in Python 3.11 loses a cancellation that coincides with an answer.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self.changed.wait()
        finally:
            # Requests in flight are paid for: they are waited for, also after an interrupt.
            if self.tasks:
                await asyncio.wait(self.tasks)
            await self.servers.close()
        if self.cap_reached:
            self.unanswered = await self._count_unanswered()
        if self.exception is not None:
            raise self.exception

    async def _refill(self) -> None:
        """Fill the ready queue with delayed jobs that are due, then with new requests that the ledger cannot answer."""
        now_seconds = time.monotonic()
        while self.delayed and self.delayed[0][0] <= now_seconds:
            self.ready.append(heapq.heappop(self.delayed)[2])
        while not self.source_exhausted and len(self.ready) < CHUNK:
            requests, responses = await self._next_chunk()
            self.source_exhausted = len(requests) < CHUNK
            for request in requests:
                key, response = request.key, responses.get(request.key)
                if response is not None and response.settles(request):
                    self.tally.stored += 1
                elif response is not None and key not in self.largest_caps:  # truncated in an earlier run
                    self.largest_caps[key] = 2 * request.max_tokens
                    self.ready.append(Job(with_cap(request, 2 * request.max_tokens), doubled=True))
                elif key in self.given_up:
                    continue
                elif key in self.largest_caps:  # a duplicate
                    self.largest_caps[key] = max(self.largest_caps[key], request.max_tokens)
                else:
                    self.largest_caps[key] = request.max_tokens
                    self.ready.append(Job(request))
            self._report_progress()

    async def _next_chunk(self) -> tuple[list[Request], dict[str, Response]]:
        """The next requests of the source, and their responses in the ledger by key."""
        requests = list(itertools.islice(self.source, CHUNK))
        return requests, await self.committer.read(lambda ledger: ledger.find_all(requests))

    def _launch(self) -> float | None:
        """Start the attempts that may be made now. Returns the seconds until more may be, or None if not before one of
        those in flight has ended."""
        if self.attempts_left == 0 and not self.tasks:
            self.cap_reached = True
            return 0.0
        now_seconds = time.monotonic()
        while self.ready and self.attempts_left != 0:
            request = self.ready[0].request
            tokens = request.prompt_bound // 4 + request.max_tokens
            waits = [(endpoint.gate.wait(tokens, now_seconds), endpoint) for endpoint in self.servers.admitted]
            free_endpoints = [endpoint for wait, endpoint in waits if wait == 0]
            if not free_endpoints:
                return min((wait for wait, _ in waits if wait is not None), default=REFRESH_SECONDS)
            endpoint = max(free_endpoints, key=lambda endpoint: endpoint.gate.limit - endpoint.gate.in_flight)
            endpoint.gate.enter(tokens, now_seconds)
            if self.attempts_left is not None:
                self.attempts_left -= 1
            task = asyncio.create_task(self._attempt(self.ready.popleft(), endpoint, now_seconds))
            self.tasks.add(task)
            task.add_done_callback(self._on_task_done)
        return max(0.0, self.delayed[0][0] - now_seconds) if self.delayed and self.attempts_left != 0 else None

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.exception = error

    async def _attempt(self, job: Job, endpoint: Endpoint, entered_at: float) -> None:
        """Reserve, send, commit and settle; then act on the outcome."""
        request, scope, price = job.request, self.scope, self.model.price
        grant = await self.committer.write(
            lambda ledger: ledger.reserve(request, price, scope, self.model.name, endpoint.name), begins=True
        )
        if not isinstance(grant, Grant):
            endpoint.gate.cancel()
            if grant == "over_budget":
                self.attempts_left = 0
                self.ready.appendleft(job)
            elif grant == "busy":
                self._delay(job, BUSY_WAIT_SECONDS)
            else:
                self.tally.stored += 1
                self._finish(job)
            return
        self.tally.micro_dollars += grant.reserved
        sent_at = time.monotonic()
        delivery = await self.servers.connection(endpoint).send(request, _idempotency_key(request, grant))
        ended_at = time.monotonic()
        judged = judge(request, delivery, price)
        outcome = await self.committer.write(
            lambda ledger: ledger.settle(grant, request, scope, delivery, judged, ended_at - sent_at)
        )
        self.tally.flag(self.model.name, outcome, self.note)
        if outcome.charge is not None:
            self.tally.micro_dollars += outcome.charge - grant.reserved
        if self.attempts_left is not None:
            self.attempts_left += 1
        endpoint.gate.leave(outcome.kind, entered_at, ended_at, outcome.retry_after, delivery.headers)
        if not delivery.sent:
            endpoint.gate.shut(ended_at)
            self.servers.revoke(endpoint)
            if job.failures + 1 >= MAX_ATTEMPTS and not self.tally.answered:
                self.fatal_message = self.fatal_message or f"{endpoint.name} cannot be reached ({outcome.message})"
        self._act_on(job, outcome)

    def _act_on(self, job: Job, outcome: Outcome) -> None:
        """Finish the job, return it to a queue, or stop the call."""
        request = job.request
        if outcome.kind == "truncated":
            largest_cap = self.largest_caps[request.key]
            if largest_cap > request.max_tokens:
                self.ready.append(Job(with_cap(request, largest_cap), doubled=job.doubled))
                return
            if not job.doubled and not request.final:
                self.ready.append(Job(with_cap(request, 2 * request.max_tokens), doubled=True))
                return
        if outcome.kind in FINAL:
            self.tally.answered += 1
            self._finish(job)
        elif outcome.kind == "fatal" or (outcome.kind == "rejected" and not self.tally.answered):
            self.fatal_message = self.fatal_message or outcome.message
        elif outcome.kind == "rejected":
            self._give_up(job, outcome)
        elif outcome.kind == "rate_limited":
            if job.throttled + 1 >= MAX_THROTTLED:
                self._give_up(job, outcome)
            else:
                self.ready.appendleft(job._replace(throttled=job.throttled + 1))
        elif job.failures + 1 >= MAX_ATTEMPTS:
            self._give_up(job, outcome)
        else:
            jitter = random.Random(f"{request.key}/{job.failures}").uniform(0.5, 1.5)
            backoff = BACKOFF_SECONDS * 2**job.failures * jitter
            self._delay(job._replace(failures=job.failures + 1), max(backoff, outcome.retry_after or 0))

    def _delay(self, job: Job, seconds: float) -> None:
        heapq.heappush(self.delayed, (time.monotonic() + seconds, next(self.tiebreaks), job))

    def _give_up(self, job: Job, outcome: Outcome) -> None:
        self.tally.failed.append(outcome.message)
        self.given_up.add(job.request.key)
        self._finish(job)

    def _finish(self, job: Job) -> None:
        del self.largest_caps[job.request.key]
        self._report_progress()

    def _report_progress(self) -> None:
        tally = self.tally
        self.report(tally.stored + tally.answered + len(tally.failed), tally.micro_dollars)

    def finish(self) -> Tally:
        """Return the tally, or raise why some requests are not answered."""
        tally, name = self.tally, self.model.name
        if self.fatal_message is not None:
            raise AskError(
                f"model {name!r}: {self.fatal_message}; nothing more was sent, and what was answered is kept"
            )
        if self.cap_reached:
            raise budget_error(name, self.scope, tally, *self.unanswered)
        if tally.failed:
            raise unanswered_error(name, tally.failed)
        return tally

    async def _count_unanswered(self) -> tuple[int, int]:
        """The number of requests that are not answered, and the most they would cost, in micro-dollars."""
        price = self.model.price
        jobs = (*self.ready, *(job for *_, job in self.delayed))
        costs = {job.request.key: worst_case(job.request, price) for job in jobs}
        while (chunk := await self._next_chunk())[0]:
            requests, responses = chunk
            costs |= {
                request.key: worst_case(request, price)
                for request in requests
                if request.key not in responses and request.key not in costs
            }
        return len(costs), sum(costs.values())


def _idempotency_key(request: Request, grant: Grant) -> str:
    """The same for all attempts without an answer in between, so that a server which supports it bills only one."""
    return digest([request.key, request.max_tokens, grant.answers_before])
