"""This machine as the only node."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from stepladder.nodes import NODE_ADDRESS, THIS_MACHINE, Ended, Slot
from stepladder.supervise import child_environment, supervised


def without_cards(count: int) -> list[tuple[str, ...]]:
    """How a machine without cards shares them out."""
    return [()]


class Here:
    """Runs commands on this machine.

    Args:
        share_out: returns the cards of each command that is to have so many; one without cards on a machine that has
            none.
    """

    is_elastic = False

    def __init__(self, share_out: Callable[[int], Sequence[tuple[str, ...]]] = without_cards) -> None:
        self._share_out = share_out

    def slots(self, cards: int) -> list[Slot]:
        return [Slot(len(names), names) for names in self._share_out(cards)]

    def workers(self) -> list[Slot]:
        return [Slot(cores=1)] * len(os.sched_getaffinity(0))

    @contextlib.contextmanager
    def running(
        self, slot: Slot, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Iterator[RunningHere]:
        own = child_environment()
        if slot.names:
            if "CUDA_VISIBLE_DEVICES" not in own:  # then the cards' numbers are the driver's
                own["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            own.pop("HIP_VISIBLE_DEVICES", None)  # under ROCm programs take either name, and not two answers
            own["CUDA_VISIBLE_DEVICES"] = ",".join(slot.names)
        with supervised(command, log, own | {NODE_ADDRESS: THIS_MACHINE, **environment}) as child:
            yield RunningHere(child)


class RunningHere:
    """A command on this machine, which writes its log itself."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def poll(self) -> Ended | None:
        return None if self._child.poll() is None else Ended(self._child.returncode)
