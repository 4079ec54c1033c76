"""The engine: sends many requests to a priced model, as fast as its servers allow and within a budget.

Every request takes the same steps: look it up in the ledger, reserve its worst case, send it, commit the raw response
and settle, and only then use the answer. A request is a job in one of two queues (ready, or delayed). When an endpoint
has room, a task makes one attempt at the job and ends; the outcome decides whether the job returns to a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from stepladder.ask.ledger import Grant, Ledger, Refusal, Scope
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.outcome import FINAL, Delivery, Outcome, judge
from stepladder.ask.remote.admission import FREE
from stepladder.ask.remote.flight import Flight, Sent
from stepladder.ask.remote.gate import reset_wait
from stepladder.ask.remote.jobs import Job, Jobs
from stepladder.ask.remote.listener import NO_LISTENER, Listener
from stepladder.ask.remote.races import Race, Races
from stepladder.ask.remote.servers import REFRESH_SECONDS, Endpoint, Servers
from stepladder.ask.remote.stopping import Stop
from stepladder.ask.remote.tally import Tally, budget_error, unanswered_error
from stepladder.ask.remote.teacher import PricedModel
from stepladder.ask.remote.waiting import Wait, WaitNotes
from stepladder.ask.request import Request, idempotency_key, with_cap, worst_case
from stepladder.errors import AskError

MAX_ATTEMPTS = 5
"""At one request, throttled ones not counted."""
MAX_THROTTLED = 50
"""Throttled attempts at one request."""
BUSY_WAIT_SECONDS = 0.25
"""Before a request that another process has sent is looked up again."""


async def ask_all(
    requests: Iterable[Request],
    model: PricedModel,
    ledger: Ledger,
    scope: Scope,
    listener: Listener = NO_LISTENER,
    stop: Stop | None = None,
) -> Tally:
    """Answer every request. The answers are in the ledger, since they may not fit in memory.

    When stopped or cancelled, it sends nothing more, but waits for the requests in flight and commits their answers.

    Args:
        requests: read as they are sent. A sequence, which may make its items as they are read, is gone on with at once
            after an interrupt, however many of its requests have been answered.
        model: whom to ask.
        ledger: stores the answers.
        scope: the account, with its caps.
        listener: receives progress, spend and messages.
        stop: nothing more is sent once it is requested.

    Raises:
        BudgetError, AskError, LedgerError: see :func:`stepladder.ask.ask_remote`.
    """
    source = _unanswered_first(requests, ledger) if isinstance(requests, Sequence) else iter(requests)
    async with Committer(ledger, listener.note) as committer:
        call = _Call(source, model, committer, scope, listener, stop or Stop())
        await call.run()
    return call.finish()


def _unanswered_first(requests: Sequence[Request], ledger: Ledger) -> Iterator[Request]:
    """All requests, beginning where an interrupted call ended. It is found by halving, and may be missed where others
    have been answered: those before it come at the end, to be looked up as well."""
    start = bisect_left(requests, True, key=lambda request: ledger.find(request) is None)
    return map(requests.__getitem__, chain(range(start, len(requests)), range(start)))


class _Call:
    """One call of :func:`ask_all`."""

    def __init__(
        self,
        source: Iterator[Request],
        model: PricedModel,
        committer: Committer,
        scope: Scope,
        listener: Listener,
        stop: Stop,
    ) -> None:
        self.model, self.committer, self.scope = model, committer, scope
        self.listener, self.stop = listener, stop
        self.changed = asyncio.Event()
        self.servers = Servers(model.servers, committer, listener.note, self.changed.set)
        self.tally = Tally()
        self.jobs = Jobs(source, committer, self._count_stored)
        self.tasks: set[asyncio.Task[None]] = set()
        self.flight = Flight(listener.note)
        self.races = Races()
        self.is_done = False
        self.wait_notes = WaitNotes(listener.note, time.monotonic())
        self.fatal_message: str | None = None
        self.exception: BaseException | None = None  # a bug, or a ledger that cannot be written
        self.attempts_left: int | None = None  # limited once a reservation exceeded a cap: one for each settled attempt
        self.cap_reached = False
        self.unanswered = (0, 0)  # once a cap is reached: remaining requests, and the most they would cost

    @property
    def is_ending(self) -> bool:
        """Whether nothing more is to be sent."""
        return self.stop.requested or self.cap_reached or self.fatal_message is not None or self.exception is not None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.stop.listen(lambda: loop.call_soon_threadsafe(self.changed.set))
        try:
            while not self.is_ending:
                self.changed.clear()
                await self.jobs.refill()
                if not (self.jobs or self.tasks):
                    self.is_done = True
                    return
                self.servers.refresh()
                if self.servers.rejection and not self.tasks:
                    self.fatal_message = self.servers.rejection
                    return
                pause = self._launch()
                self.wait_notes.look(self._awaited(), time.monotonic())
                await self._until_changed(REFRESH_SECONDS if pause is None else pause)
        finally:
            # Requests in flight are paid for: they are waited for, also after an interrupt.
            await self._drain()
            self.stop.listen(lambda: None)
            await self.servers.close()
        if self.cap_reached:
            self.unanswered = await self.jobs.count_unanswered(lambda request: worst_case(request, self.model.price))
        if self.exception is not None:
            raise self.exception

    async def _until_changed(self, seconds: float) -> None:
        """Wait until something has changed, at most so long."""
        # Not wait_for, which in Python 3.11 loses a cancellation that coincides with an answer.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, REFRESH_SECONDS)):
                await self.changed.wait()

    async def _drain(self) -> None:
        """Wait for the requests in flight, no longer than :class:`Stop` says."""
        stop = self.stop
        while self.tasks:
            self.changed.clear()
            now_seconds = time.monotonic()
            if stop.requested:
                self.committer.withdraw()
                self.flight.say_stopping(stop, now_seconds)
            else:
                self.wait_notes.look(self._awaited(), now_seconds)
            seconds_left = REFRESH_SECONDS if stop.deadline is None else stop.deadline - now_seconds
            if seconds_left <= 0:
                for task in self.tasks:
                    task.cancel()
                await asyncio.wait(self.tasks)
                return
            await self._until_changed(seconds_left)

    def _awaited(self) -> Wait | None:
        """What has to come or to pass before anything more happens."""
        if self.tasks:
            return self.flight.awaited()
        if self.jobs.ready:
            if not self.servers.admitted:
                return self.servers.awaited()
            waits = [endpoint.gate.awaited(endpoint.name, time.monotonic()) for endpoint in self.servers.admitted]
            return min(waits, key=lambda wait: wait.until or 0.0)
        return self.jobs.awaited()

    def _count_stored(self, count: int) -> None:
        self.tally.stored += count
        self._report_progress()

    def _launch(self) -> float | None:
        """Start the attempts that may be made now. Returns the seconds until more may be, or None if not before one of
        those in flight has ended."""
        if self.attempts_left == 0 and not self.tasks:
            self.cap_reached = True
            return 0.0
        now_seconds = time.monotonic()
        while self.jobs.ready and self.attempts_left != 0:
            request = self.jobs.ready[0].request
            endpoint = self._free_endpoint(request, self.servers.admitted, now_seconds)
            if endpoint is None:
                waits = [endpoint.gate.wait(_tokens(request), now_seconds) for endpoint in self.servers.admitted]
                return min((wait for wait in waits if wait is not None), default=REFRESH_SECONDS)
            if self.attempts_left is not None:
                self.attempts_left -= 1
            race = Race(self.jobs.ready.popleft(), endpoint, now_seconds)
            self.races.add(race)
            self._start(race, endpoint, now_seconds)
        if self.model.price == FREE and not self.jobs.ready:
            self._send_again(now_seconds)
        return self.jobs.seconds_until_due(now_seconds) if self.attempts_left != 0 else None

    def _free_endpoint(self, request: Request, endpoints: Sequence[Endpoint], now_seconds: float) -> Endpoint | None:
        """Of endpoints that a request may be sent to now the one with the most room."""
        free = [endpoint for endpoint in endpoints if endpoint.gate.wait(_tokens(request), now_seconds) == 0]
        return max(free, key=lambda endpoint: endpoint.gate.limit - endpoint.gate.in_flight, default=None)

    def _send_again(self, now_seconds: float) -> None:
        """Send what one server has had for too long to another one as well, now that nothing else is to be sent."""
        for race in self.races.slow(now_seconds):
            others = [endpoint for endpoint in self.servers.admitted if endpoint is not race.endpoint]
            endpoint = self._free_endpoint(race.job.request, others, now_seconds)
            if endpoint is None:
                return
            race.runners += 1
            self._start(race, endpoint, now_seconds)

    def _start(self, race: Race, endpoint: Endpoint, now_seconds: float) -> None:
        endpoint.gate.enter(_tokens(race.job.request), now_seconds)
        task = asyncio.create_task(self._attempt(race, endpoint, now_seconds))
        self.tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.exception = error

    async def _attempt(self, race: Race, endpoint: Endpoint, entered_at: float) -> None:
        """Reserve, send, commit and settle; then act on the outcome."""
        job, scope, price, is_second = race.job, self.scope, self.model.price, race.runners > 1
        request = job.request
        grant = await self.committer.write(
            lambda ledger: ledger.reserve(request, price, scope, self.model.name, endpoint.name, again=is_second),
            begins=True,
        )
        if not isinstance(grant, Grant):
            endpoint.gate.cancel()
            self.races.leave(race)
            if not is_second:
                self._act_on_refusal(job, grant)
            return
        self.tally.micro_dollars += grant.reserved
        sent_at = time.monotonic()
        if is_withdrawn := self.is_ending:
            delivery = Delivery(error="the run was stopped before it was sent", sent=False)
        else:
            connection, key = self.servers.connection(endpoint), idempotency_key(request, grant.answers_before)
            self.flight.add(grant.attempt, Sent(endpoint.name, sent_at + endpoint.timeout_seconds, grant.reserved))
            try:
                delivery = await race.run(connection.send(request, key))
            finally:
                self.flight.remove(grant.attempt)
        ended_at = time.monotonic()
        judged = judge(request, delivery, price)
        outcome = await self.committer.write(
            lambda ledger: ledger.settle(grant, request, scope, delivery, judged, ended_at - sent_at)
        )
        self.races.leave(race)
        self.tally.flag(self.model.name, outcome, self.listener.note)
        if outcome.charge is not None:
            self.tally.micro_dollars += outcome.charge - grant.reserved
        if self.attempts_left is not None:
            self.attempts_left += 1
        if is_withdrawn:
            endpoint.gate.cancel()
        else:
            self._judge_server(endpoint, delivery, outcome, entered_at, ended_at)
        if race.is_won or (race.runners and outcome.response is None):
            return  # the other attempt has brought the answer, or may still bring it
        if outcome.response is not None:
            race.win()
            self.races.learn(ended_at - sent_at)
            self.wait_notes.hear(ended_at)
            self.tally.answered_micro_dollars += outcome.response.micro_dollars
        if delivery.sent:
            self._act_on(job, outcome)
        else:  # which says nothing about the request
            self.jobs.ready.appendleft(job)

    def _act_on_refusal(self, job: Job, refusal: Refusal) -> None:
        """Finish a job that the ledger does not let be sent, or return it to a queue."""
        if refusal == "over_budget":
            self.attempts_left = 0
            self.jobs.ready.appendleft(job)
        elif refusal == "busy":
            self.jobs.delay(job, BUSY_WAIT_SECONDS, "requests that another process has sent")
        else:
            self.jobs.finish(job)
            self._count_stored(1)

    def _judge_server(
        self, endpoint: Endpoint, delivery: Delivery, outcome: Outcome, entered_at: float, ended_at: float
    ) -> None:
        """Send a server more or less from now on, or nothing."""
        message = outcome.message if delivery.sent else f"cannot be reached ({outcome.message})"
        reset_seconds = reset_wait(delivery.headers, time.time())
        endpoint.gate.leave(outcome.kind, entered_at, ended_at, outcome.retry_after, reset_seconds, message)
        if endpoint.gate.is_exhausted:
            self.servers.give_up(endpoint)
        if not delivery.sent:
            endpoint.gate.shut(ended_at)
            self.servers.revoke(endpoint)

    def _act_on(self, job: Job, outcome: Outcome) -> None:
        """Finish the job, return it to a queue, or stop the call."""
        request = job.request
        if outcome.kind == "truncated":
            largest_cap = self.jobs.largest_caps[request.key]
            if largest_cap > request.max_tokens:
                self.jobs.ready.append(Job(with_cap(request, largest_cap), doubled=job.doubled))
                return
            if not job.doubled and not request.final:
                self.jobs.ready.append(Job(with_cap(request, 2 * request.max_tokens), doubled=True))
                return
        if outcome.kind in FINAL:
            self.tally.answered += 1
            self.jobs.finish(job)
            self._report_progress()
        elif outcome.kind == "fatal" or (outcome.kind == "rejected" and not self.tally.answered):
            self.fatal_message = self.fatal_message or outcome.message
        elif outcome.kind == "rejected":
            self._give_up(job, outcome)
        elif outcome.kind == "rate_limited":
            if job.throttled + 1 >= MAX_THROTTLED:
                self._give_up(job, outcome)
            else:
                self.jobs.ready.appendleft(job._replace(throttled=job.throttled + 1))
        elif job.failures + 1 >= MAX_ATTEMPTS:
            self._give_up(job, outcome)
        else:
            self.jobs.retry_later(job, outcome.retry_after or 0.0, outcome.message)

    def _give_up(self, job: Job, outcome: Outcome) -> None:
        self.tally.failed.append(outcome.message)
        self.jobs.finish(job, given_up=True)
        self._report_progress()

    def _report_progress(self) -> None:
        tally = self.tally
        self.listener.report(tally.stored + tally.answered + len(tally.failed), tally.micro_dollars)

    def finish(self) -> Tally:
        """Return the tally, or raise why some requests are not answered."""
        tally, name = self.tally, self.model.name
        if self.fatal_message is not None:
            raise AskError(
                f"model {name!r}: {self.fatal_message}; nothing more was sent, and what was answered is kept; once "
                "that is mended, run again to go on"
            )
        if self.stop.requested and not self.is_done:
            raise AskError(
                f"model {name!r}: stopped before all requests were answered; those that are answered are kept"
            )
        if self.cap_reached:
            raise budget_error(name, self.scope, tally, *self.unanswered)
        if tally.failed:
            raise unanswered_error(name, tally.failed)
        return tally


def _tokens(request: Request) -> int:
    """The tokens of a request and its answer, at most, as limits a minute count them."""
    return request.prompt_bound // 4 + request.max_tokens
