"""What the trainers share: their data, the progress callback, and the checkpoint to resume a killed training from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder.config import Train
from stepladder.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = Callable[[int, int, str, float | None], None]
"""Called with (optimiser steps done, total steps, a note on the last one, its loss) after each step, and without a loss
while the student is validated between two steps."""
Watch = Callable[[int, int], None]
"""Called with (packs or questions validated, all of them)."""

MAX_LOG_CHARACTERS = 2000
"""Length of the end of another program's log that an error message shows."""


class Data(NamedTuple):
    """What a member is trained on, and what it is measured on after each epoch."""

    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    """Examples for the validation loss; empty: it is not measured."""
    exam: Callable[[PreTrainedTokenizerBase, PreTrainedModel, Watch], float] | None = None
    """Computes the student's validation accuracy; None: it is not measured."""
    last_epoch: int | None = None
    """The epoch to stop after, on the schedule of all; None: all are trained."""


def uses_checkpointing(settings: Train, *, cuda: bool) -> bool:
    """Whether to use gradient checkpointing: as set, by default only on CUDA."""
    return cuda if settings.gradient_checkpointing is None else settings.gradient_checkpointing


def scheduler(settings: Train) -> str:
    """The learning-rate schedule by its name in transformers."""
    return "constant_with_warmup" if settings.schedule == "constant" else settings.schedule


def log_tail(log: Path) -> str:
    """The end of another program's log."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-MAX_LOG_CHARACTERS:]


def last_complete_checkpoint(scratch: Path) -> Path | None:
    """The last complete checkpoint of a killed training. A trainer writes its state last, so a checkpoint without a
    readable state is incomplete; it is removed."""
    complete = []
    for folder in scratch.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            complete.append(folder)
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2])) if complete else None
