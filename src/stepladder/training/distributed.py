"""The default trainer on several devices: one process per device under torchrun; this process reads their files.

``python -m stepladder.training.distributed JOB.json`` is one of those processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from stepladder import models, records
from stepladder.config import Train
from stepladder.errors import UserError
from stepladder.records import Example
from stepladder.supervise import child_environment, supervised
from stepladder.training import trl
from stepladder.training.data import MAX_LOG_CHARACTERS, Data, Report

PROGRESS_FILE, ERROR_FILE = "progress.json", "error.txt"
POLL_SECONDS = 0.5
"""Time between two reads of the progress file."""


def train(settings: Train, seed: int, base: Path, data: Data, folder: Path, scratch: Path, report: Report) -> None:
    """Train as :func:`stepladder.training.trl.train`, on ``settings.devices`` devices.

    Raises:
        UserError: a process failed; the message holds its exception.
    """
    if settings.sharding == "zero3":
        models.require("deepspeed")
    for name, examples in (("examples", data.examples), ("held_out", data.held_out)):
        (scratch / f"{name}.jsonl").write_text("".join(records.lines(examples)), encoding="utf-8")
    job, progress, log = scratch / "job.json", scratch / PROGRESS_FILE, scratch / "torchrun.log"
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
    for path in (progress, scratch / ERROR_FILE):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.devices}"]
    with supervised([*command, "-m", "stepladder.training.distributed", str(job)], log, child_environment()) as child:
        reported = ""
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            progress_line = progress.read_text(encoding="utf-8") if progress.exists() else ""
            if progress_line != reported:
                reported = progress_line
                report(*json.loads(progress_line))
    if child.returncode:
        error = scratch / ERROR_FILE
        reason = error.read_text(encoding="utf-8") if error.exists() else "no exception was recorded"
        raise UserError(
            f"training on {settings.devices} devices ended with code {child.returncode} (log: {log}): {reason}"
        )


def main(path: Path) -> None:
    """Train in one of the processes, from its job file."""
    import torch

    job = json.loads(path.read_text(encoding="utf-8"))
    scratch, settings = Path(job["scratch"]), Train.model_validate(job["settings"])
    progress = scratch / PROGRESS_FILE

    def report(step: int, steps: int, loss: float) -> None:
        if os.environ["RANK"] == "0":
            partial = progress.with_suffix(".part")
            partial.write_text(json.dumps([step, steps, loss]), encoding="utf-8")
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
