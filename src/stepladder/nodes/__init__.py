"""Where commands run: on this machine, on the nodes of a Ray cluster, or in the steps of a Slurm job.

All three do one thing: run a command on a node with so many cards, and say where it runs and how it ended. The command
runs under supervise.py, so it ends with whoever started it, whatever ends that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

NODE_ADDRESS = "STEPLADDER_NODE_ADDRESS"
"""Environment variable of a command: the address under which other nodes reach its node."""
THIS_MACHINE = "127.0.0.1"
"""That address where there are no other nodes."""


class Slot(NamedTuple):
    """Room for one command."""

    cards: int = 0
    """How many it has to itself."""
    names: tuple[str, ...] = ()
    """Which, as CUDA_VISIBLE_DEVICES names them; empty where the scheduler chooses."""
    node: Any = None
    """Where it is, in the scheduler's own terms; None where the scheduler chooses."""
    address: str = THIS_MACHINE
    """Under which other nodes reach that node."""
    cores: int | None = None
    """How many processor cores it has to itself; None: its cards' share of its node's."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None
    """Its exit code; None if its node or whoever held it there was lost, and the command with it."""
    reason: str = ""
    """Why it was lost, or could not be started."""


class Running(Protocol):
    """A command that was started, or waits for room."""

    def poll(self) -> Ended | None:
        """Append to the log what the command has written since, and return how it ended, or None while it runs."""


class Nodes(Protocol):
    """Machines that run commands."""

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may leave and others join, as on a cluster."""

    def slots(self, cards: int) -> Sequence[Slot]:
        """Room for commands with so many cards each, which is more when nodes join. On nodes without any card: one
        slot a node."""

    def workers(self) -> Sequence[Slot]:
        """Room for commands that need a core each and no card."""

    def running(
        self, slot: Slot, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> AbstractContextManager[Running]:
        """Run a command in a slot, once there is room. When the block ends, so do the command and all processes it
        started.

        Args:
            slot: one of :meth:`slots` or :meth:`workers`, or of :meth:`ManyNodes.apart`.
            command: the program, by its path on the node, and its arguments.
            environment: variables beside those that programs of others are given (``supervise.child_environment``);
                :data:`NODE_ADDRESS` is added.
            log: a file on this machine that its output is appended to.
        """


class ManyNodes(Nodes, Protocol):
    """The nodes of a cluster."""

    def apart(self, count: int, cards: int) -> AbstractContextManager[Sequence[Slot]]:
        """Room for so many commands at once, with so many cards each, on nodes of their own. It is waited for.

        Raises:
            ClusterError: there are not so many nodes.
        """
