"""Commands on several nodes that work as one, such as the processes of a training: when one ends badly, all end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from stepladder.nodes import Ended, ManyNodes, Running

PORTS = range(20_000, 32_000)
"""From which the port is drawn where they meet: below those that systems give to outgoing connections."""
POLL_SECONDS = 0.5
SILENT_SECONDS = 10.0
"""That nodes are waited for before it is said."""


class Meeting(NamedTuple):
    """What a command has to know to find the others."""

    rank: int
    size: int
    address: str
    """Of the first one's node."""
    port: int


class Gang(NamedTuple):
    """So many nodes."""

    nodes: ManyNodes
    size: int
    note: Callable[[str], None]
    """Called with a message when nodes are waited for, or the commands are started again."""

    def run(
        self, cards: int, command: Callable[[Meeting], Sequence[str]], logs: Sequence[Path], watch: Callable[[], None]
    ) -> Ended:
        """Run a command on each node until all have ended, or one has ended badly; ``watch`` is called meanwhile.
        Returns how that one ended, or that all ended well.

        Args:
            cards: of each command.
            command: the command line of one of them.
            logs: a file for the output of each.
        """
        wanted = f"{self.size} nodes" + (f" with {cards} cards each" if cards else "")
        waiting = threading.Timer(SILENT_SECONDS, self.note, [f"waiting for room on {wanted}"])
        waiting.start()
        with ExitStack() as stack:
            stack.callback(waiting.cancel)
            slots = stack.enter_context(self.nodes.apart(self.size, cards))
            waiting.cancel()
            port = random.choice(PORTS)
            started = []
            for rank, (slot, log) in enumerate(zip(slots, logs, strict=True)):
                words = command(Meeting(rank, self.size, slots[0].address, port))
                started.append(stack.enter_context(self.nodes.running(slot, words, {}, log)))
            return _until_ended(started, watch)


def _until_ended(started: Sequence[Running], watch: Callable[[], None]) -> Ended:
    while True:
        ended = [running.poll() for running in started]
        watch()
        bad = [end for end in ended if end is not None and end.code != 0]
        if bad:
            return bad[0]
        if None not in ended:
            return Ended(0)
        time.sleep(POLL_SECONDS)
