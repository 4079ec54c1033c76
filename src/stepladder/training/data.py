"""What trainers share: what they are given, whom they tell, and where a killed training goes on."""

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

Report = Callable[[int, int, float], None]
"""Called with (optimiser steps done, steps in all, last loss)."""

TAIL = 2000
"""Characters of another program's log that an error shows."""


class Data(NamedTuple):
    """What a member learns from, and what it is measured on after each epoch."""

    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    """For the validation loss; nothing: it is not measured."""
    exam: Callable[[PreTrainedTokenizerBase, PreTrainedModel], float] | None = None
    """Gives the validation accuracy of the student as it is now; None: it is not measured."""


def checkpointing(settings: Train, *, cuda: bool) -> bool:
    """Whether activations are computed again: as asked, by default on a card."""
    return cuda if settings.gradient_checkpointing is None else settings.gradient_checkpointing


def scheduler(settings: Train) -> str:
    """transformers' name of the learning-rate schedule."""
    return "constant_with_warmup" if settings.schedule == "constant" else settings.schedule


def last_words(log: Path) -> str:
    """The end of another program's log."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-TAIL:]


def last_whole(scratch: Path) -> Path | None:
    """The last whole checkpoint of a training that was killed. Trainers write their state last, so a checkpoint without
    one was being written; it is removed."""
    whole = []
    for folder in scratch.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            whole.append(folder)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])) if whole else None
