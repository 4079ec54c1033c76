"""Callbacks for whoever waits for answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

SpendReport = Callable[[int, int], None]
"""Called with (requests dealt with, micro-dollars spent by this call) whenever that changes."""
Note = Callable[[str], None]
"""Called with a line about something that happened and is worth knowing."""


class Listener(NamedTuple):
    """What a caller may want to hear while it waits: progress with spend, and notes."""

    report: SpendReport = lambda done, micro_dollars: None
    note: Note = lambda line: None


NOBODY = Listener()
