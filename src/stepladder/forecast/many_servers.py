"""Questions that many servers answer at once: how long it takes, what it costs, and what limits it."""

from __future__ import annotations

from typing import NamedTuple

from stepladder.forecast import capacity
from stepladder.forecast.datasheets import Card
from stepladder.forecast.model_shape import Shape
from stepladder.forecast.workload import Workload

DRIVER_ANSWERS = 1000.0
"""A second that one driver takes in, its ledger included (``benchmarks/asking.py scale``: 998 on two cores, one of them
busy with the test server)."""
LEDGER_BYTES = 1000.0
"""That the ledger takes for an answer, beside its text."""
LEDGER_BYTES_A_TOKEN = 4.3
"""Of prompt and answer, compressed: the contest's recorded answers take 2,963 bytes each, with 1,834 bytes of text."""


class Throughput(NamedTuple):
    """How servers with a card each handle a workload, one member after another."""

    seconds: float
    rate: float
    """Answers a second."""
    at_most: int
    """Servers; more gain nothing, since the driver takes in no more."""
    ledger_bytes: float

    def limit(self, servers: int, free_bytes: float) -> str:
        """What limits so many servers, and what would help; ``free_bytes`` is the disk space for the ledger."""
        if self.ledger_bytes > free_bytes:
            place = "--runs, or [cluster] ledger, names another one"
            return f"the disk of the ledger, which has no room for all answers ({place})"
        if servers > self.at_most:
            return f"the driver, which takes in some {DRIVER_ANSWERS:,.0f} answers a second: {self.at_most} servers do"
        return f"the cards; more of them help, up to {self.at_most:,}"


def throughput(
    shape: Shape, workload: Workload, card: Card, servers: int, measured: float | None = None
) -> Throughput | None:
    """How so many servers with a card each handle a workload; None if the card cannot answer. ``measured`` is how many
    tokens a second one of them was measured to write."""
    alone = capacity.serving(shape, workload, card, measured)
    if not alone.fits:
        return None
    rate = (measured or capacity.throughput(shape, workload, card)) / workload.answer
    answers = workload.questions * workload.votes
    together = min(servers * rate, DRIVER_ANSWERS)
    return Throughput(
        seconds=workload.members * (capacity.start_seconds(workload, alone.weights) + answers / together),
        rate=together,
        at_most=max(1, int(DRIVER_ANSWERS / rate)),
        ledger_bytes=workload.members
        * answers
        * (LEDGER_BYTES + LEDGER_BYTES_A_TOKEN * (workload.prompt + workload.answer)),
    )
