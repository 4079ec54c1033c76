"""The nodes of the Slurm job that this process runs in: each command is a step of the job.

``python -m stepladder.nodes.on_slurm COMMAND ...`` is what a step runs on its node.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stepladder.errors import ClusterError
from stepladder.nodes import NODE_ADDRESS, Ended, Slot
from stepladder.supervise import child_environment, open_log

STOP_SECONDS = 15.0
"""That a step has to end by itself before it is killed."""
LOST = 137
"""Exit code of a step whose processes were killed, as all of a node's are when it is lost."""


class OnSlurm:
    """Runs commands as steps of this process's Slurm job, on all of its nodes.

    Raises:
        ClusterError: this process is not in a Slurm job.
    """

    is_elastic = True

    def __init__(self) -> None:
        if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
            raise ClusterError(
                "[cluster] scheduler = 'slurm': this is not inside a Slurm job; start it in one, with sbatch or salloc"
            )
        self._nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self._cards = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
        self._cores = int(os.environ["SLURM_CPUS_ON_NODE"])

    def slots(self, cards: int) -> list[Slot]:
        if not self._cards:
            return [Slot()] * self._nodes
        return [Slot(cards)] * (self._nodes * (self._cards // cards))

    def workers(self) -> list[Slot]:
        return [Slot(cores=1)] * (self._nodes * self._cores)

    @contextlib.contextmanager
    def apart(self, count: int, cards: int) -> Iterator[list[Slot]]:
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()  # noqa: S603
        if count > len(names) or cards > self._cards:
            raise ClusterError(
                f"[cluster] train_nodes = {count}: the job has {len(names)} nodes with {self._cards} cards each; ask "
                "for more in its batch file"
            )
        yield [Slot(cards, node=name, address=socket.gethostbyname(name)) for name in names[:count]]

    @contextlib.contextmanager
    def running(
        self, slot: Slot, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Iterator[RunningStep]:
        share = self._cores // max(1, self._cards // slot.cards) if slot.cards else self._cores
        cores = share if slot.cores is None else slot.cores
        step = ["srun", "--nodes=1", "--ntasks=1", "--exact", "--mem=0", f"--cpus-per-task={cores}", "--unbuffered"]
        if slot.cards:
            step.append(f"--gres=gpu:{slot.cards}")
        if slot.node is not None:
            step.append(f"--nodelist={slot.node}")
        own = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
        with open_log(log) as file:
            child = subprocess.Popen(  # noqa: S603
                [*step, sys.executable, "-m", "stepladder.nodes.on_slurm", *command],
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=child_environment() | own | dict(environment),
            )  # fmt: skip
        try:
            yield RunningStep(child)
        finally:
            if child.stdin is not None:
                child.stdin.close()  # which the step notices (supervise.py)
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class RunningStep:
    """A step of a Slurm job; srun writes its log."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def poll(self) -> Ended | None:
        code = self._child.poll()
        if code is None:
            return None
        return Ended(None, "its step was killed") if code == LOST else Ended(code)


def main() -> None:
    """Run a command under supervise.py on the node of this step."""
    os.environ[NODE_ADDRESS] = socket.gethostbyname(os.environ["SLURMD_NODENAME"])
    words = [sys.executable, "-m", "stepladder.supervise", *sys.argv[1:]]
    os.execv(sys.executable, words)  # noqa: S606


if __name__ == "__main__":
    main()
