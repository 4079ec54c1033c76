"""Commands on several nodes that work as one, such as the processes of a training: when one ends badly, all end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from stepladder.nodes import Ended, ManyNodes, Running

PORTS = range(20_000, 32_000)
"""From which the port is drawn where they meet: below those that systems give to outgoing connections."""
MAX_RESTARTS = 20
"""Of commands that had got further each time."""
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

    def variables(self, processes: int) -> dict[str, str]:
        """The environment in which torchrun and ms-swift start so many processes on this node."""
        return {
            "NNODES": str(self.size), "NODE_RANK": str(self.rank), "NPROC_PER_NODE": str(processes),
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip


class Gang(NamedTuple):
    """So many nodes."""

    nodes: ManyNodes
    size: int
    note: Callable[[str], None]
    """Called with a message when nodes are waited for, or the commands are started again."""

    @property
    def has_cards(self) -> bool:
        """Whether the nodes have cards, which trainings then run on."""
        return any(slot.cards for slot in self.nodes.slots(1))

    def persist(self, attempt: Callable[[], Ended], step: Callable[[], int], reason: Callable[[], str]) -> Ended:
        """Run a training, and go on with it as long as it gets further; returns how it ended.

        Args:
            attempt: runs it from its last checkpoint to its end.
            step: that the last attempt had reached, 0 before its first.
            reason: why the last attempt ended.
        """
        for _ in range(MAX_RESTARTS):
            ended = attempt()
            if ended.code == 0 or not step():
                return ended
            self.note(f"training ended at step {step()} ({reason()}) and goes on from the last checkpoint")
        return attempt()

    def run(
        self,
        devices: int,
        command: Callable[[Meeting], tuple[Sequence[str], Mapping[str, str]]],
        log: Path,
        watch: Callable[[], None],
    ) -> Ended:
        """Run a command on each node until all have ended, or one has ended badly; ``watch`` is called meanwhile.
        Returns how that one ended, or that all ended well.

        Args:
            devices: of each command: cards, where there are any.
            command: the command line and the environment of one of them.
            log: file for the output of the first; those of the others are beside it.
        """
        cards = devices if self.has_cards else 0
        wanted = f"{self.size} nodes" + (f" with {cards} cards each" if cards else "")
        waiting = threading.Timer(SILENT_SECONDS, self.note, [f"waiting for room on {wanted}"])
        waiting.start()
        with ExitStack() as stack:
            stack.callback(waiting.cancel)
            slots = stack.enter_context(self.nodes.apart(self.size, cards))
            waiting.cancel()
            port = random.choice(PORTS)
            started = []
            for rank, slot in enumerate(slots):
                words, environment = command(Meeting(rank, self.size, slots[0].address, port))
                own_log = log.with_stem(f"{log.stem}-{rank}") if rank else log
                started.append(stack.enter_context(self.nodes.running(slot, words, environment, own_log)))
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
