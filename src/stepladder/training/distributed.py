"""The default trainer on several devices, of this machine or of several nodes: one process per device under torchrun;
this process reads their files.

``python -m stepladder.training.distributed JOB.json`` is one of those processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from stepladder import models, records
from stepladder.config import Train
from stepladder.errors import UserError
from stepladder.nodes import Ended
from stepladder.nodes.gang import Gang, Meeting
from stepladder.records import Example
from stepladder.supervise import child_environment, run_watched
from stepladder.training import trl
from stepladder.training.data import MAX_LOG_CHARACTERS, Data, Report, last_complete_checkpoint

PROGRESS_FILE, ERROR_FILE = "progress.json", "error.txt"


def train(
    settings: Train,
    seed: int,
    base: Path,
    data: Data,
    folder: Path,
    scratch: Path,
    report: Report,
    gang: Gang | None = None,
) -> None:
    """Train as :func:`stepladder.training.trl.train`, on ``settings.devices`` devices: of this machine, or of the nodes
    of a gang, which all see these folders. Where a node or one of its processes is lost, all start again from the last
    checkpoint.

    Raises:
        UserError: a process failed; the message holds its exception.
    """
    if settings.sharding == "zero3":
        models.require("deepspeed")
    for name, examples in (("examples", data.examples), ("held_out", data.held_out)):
        (scratch / f"{name}.jsonl").write_text("".join(records.lines(examples)), encoding="utf-8")
    job, error = scratch / "job.json", scratch / ERROR_FILE
    paths = {"base": base, "folder": folder, "scratch": scratch}
    absolute_paths = {name: str(path.resolve()) for name, path in paths.items()}
    job.write_text(
        json.dumps(
            {
                "settings": settings.model_dump(mode="json"),
                "seed": seed,
                "last_epoch": data.last_epoch,
                **absolute_paths,
            }
        ),
        encoding="utf-8",
    )
    progress, log = _Progress(scratch / PROGRESS_FILE, report), scratch / "torchrun.log"

    def attempt() -> Ended:
        last_complete_checkpoint(scratch)  # incomplete ones are removed here, and not by several processes at once
        progress.reset()
        error.unlink(missing_ok=True)
        return (
            _run_here(settings, job, log, progress) if gang is None else _run_gang(gang, settings, job, log, progress)
        )

    def reason() -> str:
        return error.read_text(encoding="utf-8").strip() if error.exists() else "no exception was recorded"

    ended = attempt() if gang is None else gang.persist(attempt, progress.step, reason)
    if ended.code != 0:
        raise UserError(f"training on {settings.devices} devices ended with code {ended.code} (log: {log}): {reason()}")


class _Progress:
    """What the first process writes of how far it is, read now and then."""

    def __init__(self, file: Path, report: Report) -> None:
        self._file, self._report = file, report
        self._last: list[Any] = []
        """The arguments of the last report; empty before the first step."""

    def reset(self) -> None:
        """Forget what was written before."""
        self._file.unlink(missing_ok=True)
        self._last = []

    def step(self) -> int:
        """The last one, 0 before the first."""
        return int(self._last[0]) if self._last else 0

    def read(self) -> None:
        line = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        if line and (now := json.loads(line)) != self._last:
            self._last = now
            self._report(*now)


def _run_here(settings: Train, job: Path, log: Path, progress: _Progress) -> Ended:
    """Run the processes on this machine until they have ended."""
    words = _torchrun(settings.devices, job, "--standalone")
    return Ended(run_watched(words, log, child_environment(), progress.read))


def _run_gang(gang: Gang, settings: Train, job: Path, log: Path, progress: _Progress) -> Ended:
    """Run the processes on the nodes of a gang until all have ended, or one is lost."""
    each = settings.devices // gang.size

    def command(meeting: Meeting) -> tuple[list[str], dict[str, str]]:
        where = [f"--nnodes={meeting.size}", f"--node-rank={meeting.rank}"]
        master = [f"--master-addr={meeting.address}", f"--master-port={meeting.port}"]
        return _torchrun(each, job, *where, *master), {}

    return gang.run(each, command, log, progress.read)


def _torchrun(processes: int, job: Path, *where: str) -> list[str]:
    own = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *where]
    return [*own, "-m", "stepladder.training.distributed", str(job.resolve())]


def main(path: Path) -> None:
    """Train in one of the processes, from its job file."""
    import torch

    job = json.loads(path.read_text(encoding="utf-8"))
    scratch, settings = Path(job["scratch"]), Train.model_validate(job["settings"])
    progress = scratch / PROGRESS_FILE

    def report(*now: Any) -> None:
        if os.environ["RANK"] == "0":
            partial = progress.with_suffix(".part")
            partial.write_text(json.dumps(now), encoding="utf-8")
            partial.replace(progress)

    examples, held_out = (records.read(scratch / f"{name}.jsonl", Example) for name in ("examples", "held_out"))
    data = Data(examples, held_out, last_epoch=job["last_epoch"])
    try:
        trl.train(settings, job["seed"], Path(job["base"]), data, Path(job["folder"]), scratch, report)
        # A process that exits while threads of its group still run may be aborted, which would count as a failure.
        torch.distributed.destroy_process_group()
    except Exception as error:
        (scratch / ERROR_FILE).write_text(
            f"{type(error).__name__}: {str(error)[:MAX_LOG_CHARACTERS]}\n", encoding="utf-8"
        )
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
