"""How a call of the engine is asked to end before its time."""

from __future__ import annotations

import time
from collections.abc import Callable

GRACE_SECONDS = 5.0
"""For answers in flight after the second Ctrl-C, or once a time limit is reached."""


class Stop:
    """Asks for the end of a call: nothing more is sent, and answers in flight are awaited until ``deadline``.

    May be asked from any thread or signal handler, as often as one likes: once asked it stays so, and a deadline is
    never moved.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deadline: float | None = None
        """On the monotonic clock, in seconds; None: as long as the requests themselves may take."""
        self._on_request: Callable[[], object] = lambda: None

    def listen(self, on_request: Callable[[], object]) -> None:
        """Call this at each request, in the thread that makes it."""
        self._on_request = on_request

    def request(self, seconds: float | None = None) -> None:
        """Stop; with ``seconds``, wait no longer than that for answers in flight."""
        self.requested = True
        if seconds is not None and self.deadline is None:
            self.deadline = time.monotonic() + seconds
        self._on_request()
