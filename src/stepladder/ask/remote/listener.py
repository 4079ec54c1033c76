"""Callbacks of a call that asks a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

SpendReport = Callable[[int, int], None]
"""Called with (finished requests, micro-dollars spent by this call) whenever either changes."""
Note = Callable[[str], None]
"""Called with a message of one line."""


class Listener(NamedTuple):
    """Receives progress with spend, and messages."""

    report: SpendReport = lambda finished, micro_dollars: None
    note: Note = lambda line: None


NO_LISTENER = Listener()
