"""How many requests may be in flight at one endpoint, and when the next may go. Pure: the time is an argument, in
seconds of a monotonic clock.

The limit on requests in flight starts small and doubles each round trip until the server shows strain. Then it falls by
a third at each new sign of strain and grows by a twentieth, at least by one, each round trip without (slow start and
multiplicative decrease, Jacobson 1988; a round trip takes seconds here, so growth by one alone would be too slow).
Strain is a 429, or failures of more than a quarter of the requests: single failures happen at any load.

A server that gives nothing usable is not fed the queue: before its first answer a few requests probe it, and after a
failure one at a time, with growing pauses, until an answer comes. Failures in a row are counted by rounds: one counts
if it was sent after the one counted before had come back. After a limited number the server is given up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepladder.ask.outcome import Kind
from stepladder.ask.remote.waiting import Wait

PROBES = 4
"""Requests in flight before the first answer; no more are wasted on a wrong key or a page of a hotel's Wi-Fi."""
START_IN_FLIGHT = 16
"""Requests in flight after the first answer."""
DECREASE_FACTOR = 2 / 3
GROWTH_SHARE = 0.05
FAILURES: frozenset[Kind] = frozenset({"transient", "lost"})
MAX_FAILURE_SHARE = 0.25
UNUSABLE: frozenset[Kind] = FAILURES | {"rate_limited", "malformed"}
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0)
"""Before the next request after the first, second, ... failure in a row, unless the server names a time itself. A first
failure that is no 429 makes no pause."""
MAX_PAUSE_SECONDS = 120.0
"""Whatever a server asks for; then one request tries again."""
FIRST_TRIES, TRIES = 6, 12
"""Failures in a row after which a server is given up that has not answered yet, or that has."""
EPOCH_SECONDS = 1e9
"""A reset time from here on is a point in time, in seconds since the epoch, and no duration."""


@dataclass
class Bucket:
    """A token bucket: ``rate`` units a minute, of which five seconds' worth may be taken at once."""

    rate: float
    level: float = field(init=False)
    updated: float | None = None

    def __post_init__(self) -> None:
        self.level = self.burst

    @property
    def burst(self) -> float:
        return max(1.0, self.rate / 12)

    def wait(self, amount: float, now_seconds: float) -> float:
        """Seconds until ``amount`` may be taken. More than the burst may be taken when the bucket is full."""
        self.refill(now_seconds)
        return max(0.0, (min(amount, self.burst) - self.level) / self.rate * 60)

    def take(self, amount: float, now_seconds: float) -> None:
        self.refill(now_seconds)
        self.level -= amount

    def refill(self, now_seconds: float) -> None:
        if self.updated is not None:
            self.level = min(self.burst, self.level + (now_seconds - self.updated) * self.rate / 60)
        self.updated = now_seconds


class Gate:
    """Limits the requests to one endpoint.

    Args:
        ceiling: the most requests in flight.
        requests_per_minute, tokens_per_minute: the account's limits, where they are known.
        start: requests in flight before the first answer.

    Attributes:
        failures: in a row, without an answer since.
        last_failure: the message of the last one.
    """

    def __init__(
        self,
        ceiling: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        start: int = PROBES,
    ) -> None:
        self.ceiling = ceiling
        self.failures = 0
        self.last_failure = ""
        self._failed_at = -math.inf
        self._has_answered = False
        self.limit = float(min(start, ceiling))
        self.in_flight = 0
        self._threshold = math.inf
        self._closed_until = 0.0
        self._decreased_at = -math.inf
        self._full_at = -math.inf
        self._failure_share = 0.0  # exponential average over about sixteen requests
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute)

    def wait(self, tokens: float, now_seconds: float) -> float | None:
        """Seconds until a request of so many tokens may be sent; None: not before another one has ended."""
        if self.in_flight >= (1 if self.failures else int(self.limit)):
            return None
        waits = [self._closed_until - now_seconds]
        if self._requests:
            waits.append(self._requests.wait(1, now_seconds))
        if self._tokens:
            waits.append(self._tokens.wait(tokens, now_seconds))
        return max(0.0, *waits)

    def enter(self, tokens: float, now_seconds: float) -> None:
        """Count a request that is about to be sent."""
        self.in_flight += 1
        if self.in_flight >= int(self.limit):
            self._full_at = now_seconds
        if self._requests:
            self._requests.take(1, now_seconds)
        if self._tokens:
            self._tokens.take(tokens, now_seconds)

    def cancel(self) -> None:
        """Count out a request that entered but was not sent."""
        self.in_flight -= 1

    def leave(
        self,
        kind: Kind,
        entered_at: float,
        now_seconds: float,
        retry_after: float | None = None,
        reset_wait: float = 0.0,
        message: str = "",
    ) -> None:
        """Count a request that has ended, and adapt the limit to its outcome.

        Args:
            kind: the outcome.
            entered_at: when it entered.
            now_seconds: when it ended.
            retry_after: seconds that the server asks to wait, if it does.
            reset_wait: seconds until the account's rate limit resets, if it is used up.
            message: what failed.
        """
        self.in_flight -= 1
        self._failure_share += ((kind in FAILURES) - self._failure_share) / 16
        if kind not in UNUSABLE:
            self._answer(entered_at, now_seconds, reset_wait)
            return
        self.last_failure = message
        if entered_at >= self._failed_at:  # one sent before the last failure came says nothing new
            self.failures += 1
            self._failed_at = now_seconds
            if kind == "rate_limited" or self.failures > 1:
                self._close(now_seconds, self._pause() if retry_after is None else retry_after)
        elif kind == "rate_limited" and retry_after is not None:
            self._close(now_seconds, retry_after)
        is_strained = kind == "rate_limited" or self._failure_share > MAX_FAILURE_SHARE
        if is_strained and entered_at >= self._decreased_at:  # the same of the limit
            self._threshold = self.limit = max(1.0, self.limit * DECREASE_FACTOR)
            self._decreased_at = now_seconds

    def _answer(self, entered_at: float, now_seconds: float, reset_wait: float) -> None:
        self.forgive()
        if not self._has_answered:
            self._has_answered = True
            self.limit = max(self.limit, min(START_IN_FLIGHT, self.ceiling))
        if self._full_at >= entered_at:  # a limit that was not reached since has not been tested
            step = 1.0 if self.limit < self._threshold else max(1.0 / self.limit, GROWTH_SHARE)
            self.limit = min(float(self.ceiling), self.limit + step)
        if reset_wait:
            self.last_failure = "its rate limit is used up"
            self._close(now_seconds, reset_wait)

    def forgive(self) -> None:
        """Count failures from 0 again."""
        self.failures = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether so much has failed in a row that nothing more is to be sent."""
        return self.failures >= (TRIES if self._has_answered else FIRST_TRIES)

    def awaited(self, name: str, now_seconds: float) -> Wait:
        """What is waited for while nothing may be sent to the server of this name."""
        if self._closed_until > now_seconds:
            key, reason = (name, self._closed_until), self.last_failure
            return Wait(f"{name}, which is asked nothing for now ({reason})", self._closed_until, key, is_pause=True)
        return Wait(f"{name}, whose limits a minute are reached", None, (name, "limits"))

    def shut(self, now_seconds: float) -> None:
        """The server cannot be reached: send it nothing for a while, so that other endpoints get the requests."""
        if now_seconds >= self._closed_until:
            self._close(now_seconds, self._pause())

    def _close(self, now_seconds: float, seconds: float) -> None:
        self._closed_until = max(self._closed_until, now_seconds + min(seconds, MAX_PAUSE_SECONDS))

    def _pause(self) -> float:
        """Seconds to pause, longer with each failure in a row."""
        return PAUSES_SECONDS[min(max(self.failures, 1), len(PAUSES_SECONDS)) - 1]


def reset_wait(headers: Mapping[str, str], timestamp: float) -> float:
    """Seconds until the account's rate limit resets, if x-ratelimit headers say that it is used up; otherwise 0.
    ``timestamp`` is when they came, in seconds since the epoch."""
    waits = [0.0]
    for unit in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{unit}") == "0":
            seconds = parse_duration(headers.get(f"x-ratelimit-reset-{unit}", ""))
            if seconds >= 1000 * EPOCH_SECONDS:
                seconds /= 1000  # milliseconds since the epoch
            waits.append(seconds - timestamp if seconds >= EPOCH_SECONDS else seconds)
    return min(max(waits), MAX_PAUSE_SECONDS)


def parse_duration(text: str) -> float:
    """Seconds of a duration as these headers write it: ``1s``, ``6m0s``, ``20ms``, ``1h2m3.5s``, ``12``; 0 for anything
    else."""
    parts = re.fullmatch(r"(?:(\d{1,15})h)?(?:(\d{1,15})m)?(?:(\d{1,15}(?:\.\d{1,15})?)(ms|s)?)?", text, re.ASCII)
    if parts is None:
        return 0.0
    hours, minutes, number, unit = parts.groups(default="0")
    return 3600.0 * float(hours) + 60.0 * float(minutes) + float(number) * (0.001 if unit == "ms" else 1.0)
