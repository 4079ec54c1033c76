"""What a call of the engine waits for, and when it says so: a wait of more than five seconds is never silent.

Pure but for the clock on the wall: times are arguments, in seconds of a monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import NamedTuple

from stepladder.ask.remote.listener import Note

SILENCE_SECONDS = 5.0
"""Without an answer, before it is said what is waited for; a pause that will last longer is said at its beginning."""
REPEAT_SECONDS, REPEAT_SHARE = 60.0, 1 / 24
"""Before the same wait is said again: a minute, or this share of what is left of it."""
DAY_SECONDS = 86_400.0


class Wait(NamedTuple):
    """Something that is waited for."""

    what: str
    until: float | None
    """At the latest; None: without a limit."""
    key: Hashable
    """The same for the same wait."""
    is_pause: bool = False
    """Whether nothing can come before it is over."""


class WaitNotes:
    """Says what is waited for.

    Args:
        note: called with a line.
        now_seconds: the time.
    """

    def __init__(self, note: Note, now_seconds: float) -> None:
        self._note = note
        self._quiet_since = now_seconds
        self._silent_until: dict[Hashable, float] = {}

    def hear(self, now_seconds: float) -> None:
        """An answer came."""
        self._quiet_since = now_seconds

    def look(self, wait: Wait | None, now_seconds: float) -> None:
        """Say what is waited for, if that lasts, or will last, and has not just been said."""
        if wait is None:
            return
        is_long_pause = wait.is_pause and wait.until is not None and wait.until - now_seconds > SILENCE_SECONDS
        if not is_long_pause and now_seconds - self._quiet_since < SILENCE_SECONDS:
            return
        left_seconds = 0.0 if wait.until is None else wait.until - now_seconds
        if now_seconds >= self._silent_until.get(wait.key, now_seconds):
            self._silent_until = {key: until for key, until in self._silent_until.items() if until > now_seconds}
            self._silent_until[wait.key] = now_seconds + max(REPEAT_SECONDS, REPEAT_SHARE * left_seconds)
            self._note(f"waiting for {wait.what}{_until(wait, now_seconds)}")


def _until(wait: Wait, now_seconds: float) -> str:
    if wait.until is None:
        return ""
    return f", until {clock(wait.until - now_seconds)}{'' if wait.is_pause else ' at the latest'}"


def clock(seconds_ahead: float) -> str:
    """The local time so many seconds from now, with its date if that is more than a day."""
    form = "%H:%M:%S" if seconds_ahead < DAY_SECONDS else "%Y-%m-%d %H:%M:%S"
    return time.strftime(form, time.localtime(time.time() + max(0.0, seconds_ahead)))
