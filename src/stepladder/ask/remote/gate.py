"""How many requests may be in flight at one endpoint, and when the next may go. Pure: time is handed in.

The limit starts small and doubles each round trip until the server shows strain; then it falls by a third at each new
sign of strain and grows by a twentieth, at least by one, each round trip without (slow start and decrease: Jacobson
1988; a round trip is seconds here, so growth by one alone would never come back). Strain is a 429, or failures that are
more than a quarter of what comes back: single ones happen at any load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepladder.ask.outcome import Kind

START = 16
"""Requests in flight before the first answer; all that a wrong key can waste."""
DECREASE = 2 / 3
GROWTH = 0.05
FAILURES: frozenset[Kind] = frozenset({"transient", "lost"})
TROUBLE = 0.25
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to leave an endpoint alone after the first, second, ... 429 in a row that does not say how long."""


@dataclass
class Bucket:
    """A token bucket: ``rate`` a minute, of which a few seconds' worth may go at once."""

    rate: float
    level: float = field(init=False)
    updated: float | None = None

    def __post_init__(self) -> None:
        self.level = self.burst

    @property
    def burst(self) -> float:
        return max(1.0, self.rate / 12)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` may be taken. One that exceeds the burst goes when the bucket is full."""
        self.refill(now)
        return max(0.0, (min(amount, self.burst) - self.level) / self.rate * 60)

    def take(self, amount: float, now: float) -> None:
        self.refill(now)
        self.level -= amount

    def refill(self, now: float) -> None:
        if self.updated is not None:
            self.level = min(self.burst, self.level + (now - self.updated) * self.rate / 60)
        self.updated = now


class Gate:
    """The entrance to one endpoint.

    Args:
        ceiling: never more than this many in flight.
        start: so many before the first answer.
        requests_per_minute, tokens_per_minute: the account's limits, where they are known.
    """

    def __init__(
        self,
        ceiling: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        start: int = START,
    ) -> None:
        self.ceiling = ceiling
        self.limit = float(min(start, ceiling))
        self.in_flight = 0
        self._threshold = math.inf
        self._closed_until = 0.0
        self._eased_at = -math.inf
        self._full_at = -math.inf
        self._trouble = 0.0  # share of failures among the last sixteen or so
        self._refused = 0
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute)

    def wait(self, tokens: float, now: float) -> float | None:
        """Seconds until a request of so many tokens may go; 0: now; None: not before another one is back."""
        if self.in_flight >= int(self.limit):
            return None
        waits = [self._closed_until - now]
        if self._requests:
            waits.append(self._requests.wait(1, now))
        if self._tokens:
            waits.append(self._tokens.wait(tokens, now))
        return max(0.0, *waits)

    def enter(self, tokens: float, now: float) -> None:
        """A request goes."""
        self.in_flight += 1
        if self.in_flight >= int(self.limit):
            self._full_at = now
        if self._requests:
            self._requests.take(1, now)
        if self._tokens:
            self._tokens.take(tokens, now)

    def turn_back(self) -> None:
        """A request that entered was not sent after all."""
        self.in_flight -= 1

    def leave(
        self, kind: Kind, sent_at: float, now: float, retry_after: float | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        """A request is back, or lost."""
        self.in_flight -= 1
        self._trouble += ((kind in FAILURES) - self._trouble) / 16
        if kind == "rate_limited" or (kind in FAILURES and self._trouble > TROUBLE):
            # What was sent before the last decrease knows nothing of it.
            if sent_at >= self._eased_at:
                self._threshold = self.limit = max(1.0, self.limit * DECREASE)
                self._eased_at = now
                if kind == "rate_limited":
                    pause = self._pause()
                    self._close(now + (pause if retry_after is None else retry_after))
            elif retry_after is not None:
                self._close(now + retry_after)
            return
        if kind in FAILURES:
            return
        self._refused = 0
        if self._full_at >= sent_at:  # a limit that was not reached since says nothing about the server
            step = 1.0 if self.limit < self._threshold else max(1.0 / self.limit, GROWTH)
            self.limit = min(float(self.ceiling), self.limit + step)
        if exhausted := remaining_until(headers):
            self._close(now + exhausted)

    def shut(self, now: float) -> None:
        """Nobody is there: leave it alone for a while, so that other endpoints get the work."""
        if now >= self._closed_until:
            self._close(now + self._pause())

    def _close(self, until: float) -> None:
        self._closed_until = max(self._closed_until, until)

    def _pause(self) -> float:
        """Seconds to wait after one more refusal in a row."""
        self._refused += 1
        return WAITS[min(self._refused, len(WAITS)) - 1]


def remaining_until(headers: Mapping[str, str]) -> float:
    """Seconds until the account's window resets, where the x-ratelimit headers say that nothing is left of it."""
    waits = [0.0]
    for what in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{what}") == "0":
            waits.append(seconds(headers.get(f"x-ratelimit-reset-{what}", "")))
    return max(waits)


def seconds(text: str) -> float:
    """Seconds of a duration as these headers write it: ``1s``, ``6m0s``, ``20ms``, ``1h2m3.5s``, ``12``."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s|)", text))
