"""How many requests may be in flight at one endpoint, and when the next may go. Pure: the time is an argument, in
seconds of a monotonic clock.

The limit on requests in flight starts small and doubles each round trip until the server shows strain. Then it falls by
a third at each new sign of strain and grows by a twentieth, at least by one, each round trip without (slow start and
multiplicative decrease, Jacobson 1988; a round trip takes seconds here, so growth by one alone would be too slow).
Strain is a 429, or failures of more than a quarter of the requests: single failures happen at any load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepladder.ask.outcome import Kind

START_IN_FLIGHT = 16
"""Requests in flight before the first answer; no more are wasted on a wrong key."""
DECREASE_FACTOR = 2 / 3
GROWTH_SHARE = 0.05
FAILURES: frozenset[Kind] = frozenset({"transient", "lost"})
MAX_FAILURE_SHARE = 0.25
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Before the next request after the first, second, ... 429 in a row without a Retry-After header."""


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
    """

    def __init__(
        self,
        ceiling: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        start: int = START_IN_FLIGHT,
    ) -> None:
        self.ceiling = ceiling
        self.limit = float(min(start, ceiling))
        self.in_flight = 0
        self._threshold = math.inf
        self._closed_until = 0.0
        self._decreased_at = -math.inf
        self._full_at = -math.inf
        self._failure_share = 0.0  # exponential average over about sixteen requests
        self._pauses_in_a_row = 0
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute)

    def wait(self, tokens: float, now_seconds: float) -> float | None:
        """Seconds until a request of so many tokens may be sent; None: not before another one has ended."""
        if self.in_flight >= int(self.limit):
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
        headers: Mapping[str, str] = {},
    ) -> None:
        """Count a request that has ended, and adapt the limit to its outcome."""
        self.in_flight -= 1
        self._failure_share += ((kind in FAILURES) - self._failure_share) / 16
        if kind == "rate_limited" or (kind in FAILURES and self._failure_share > MAX_FAILURE_SHARE):
            # A request sent before the last decrease says nothing about the limit since.
            if entered_at >= self._decreased_at:
                self._threshold = self.limit = max(1.0, self.limit * DECREASE_FACTOR)
                self._decreased_at = now_seconds
                if kind == "rate_limited":
                    pause = self._pause()
                    self._close(now_seconds + (pause if retry_after is None else retry_after))
            elif retry_after is not None:
                self._close(now_seconds + retry_after)
            return
        if kind in FAILURES:
            return
        self._pauses_in_a_row = 0
        if self._full_at >= entered_at:  # a limit that was not reached since has not been tested
            step = 1.0 if self.limit < self._threshold else max(1.0 / self.limit, GROWTH_SHARE)
            self.limit = min(float(self.ceiling), self.limit + step)
        if wait := reset_wait(headers):
            self._close(now_seconds + wait)

    def shut(self, now_seconds: float) -> None:
        """The server cannot be reached: send it nothing for a while, so that other endpoints get the requests."""
        if now_seconds >= self._closed_until:
            self._close(now_seconds + self._pause())

    def _close(self, until: float) -> None:
        self._closed_until = max(self._closed_until, until)

    def _pause(self) -> float:
        """Seconds to pause, longer each time until a request succeeds."""
        self._pauses_in_a_row += 1
        return PAUSES_SECONDS[min(self._pauses_in_a_row, len(PAUSES_SECONDS)) - 1]


def reset_wait(headers: Mapping[str, str]) -> float:
    """Seconds until the account's rate limit resets, if x-ratelimit headers say that it is used up; otherwise 0."""
    waits = [0.0]
    for unit in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{unit}") == "0":
            waits.append(parse_duration(headers.get(f"x-ratelimit-reset-{unit}", "")))
    return max(waits)


def parse_duration(text: str) -> float:
    """Seconds of a duration as these headers write it: ``1s``, ``6m0s``, ``20ms``, ``1h2m3.5s``, ``12``."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s|)", text))
