"""The attempts of a call of the engine that have been sent and not come back, and what is said of them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from stepladder.ask.remote.listener import Note
from stepladder.ask.remote.stopping import Stop
from stepladder.ask.remote.waiting import Wait, clock


class Sent(NamedTuple):
    """An attempt that has been sent."""

    server: str
    until: float
    """On the monotonic clock: by then its answer is here, or it has failed."""
    reserved: int
    """Micro-dollars."""


class Flight:
    """Attempts in flight, by their ids."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._sent: dict[int, Sent] = {}
        self._said_of: set[bool] = set()
        """Of which stops something has been said: those without a deadline (False), with one (True)."""

    def add(self, attempt: int, sent: Sent) -> None:
        self._sent[attempt] = sent

    def remove(self, attempt: int) -> None:
        del self._sent[attempt]

    def awaited(self) -> Wait | None:
        """The answers that are waited for."""
        if not self._sent:
            return None
        by_server = Counter(sent.server for sent in self._sent.values())
        what = " and ".join(f"{_answers(count)} of {name}" for name, count in sorted(by_server.items()))
        return Wait(what, self._last(), "answers")

    def say_stopping(self, stop: Stop, now_seconds: float) -> None:
        """Say what becomes of the answers in flight, once after a stop, and once after one with a deadline."""
        count, has_deadline = len(self._sent), stop.deadline is not None
        if not count or has_deadline in self._said_of:
            return
        self._said_of.add(has_deadline)
        be = "is" if count == 1 else "are"
        if stop.deadline is None:
            until = clock(self._last() - now_seconds)
            self._note(f"stopping: nothing more is sent; {_answers(count)} {be} awaited, until {until} at the latest")
        else:
            dollars = sum(sent.reserved for sent in self._sent.values()) / 1e6
            worth = f", worth at most ${dollars:.4f}," if dollars else ""
            until = clock(stop.deadline - now_seconds)
            self._note(f"stopping: {_answers(count)}{worth} {be} lost if not here by {until}")

    def _last(self) -> float:
        return max(sent.until for sent in self._sent.values())


def _answers(count: int) -> str:
    return f"{count:,} answer{'' if count == 1 else 's'}"
