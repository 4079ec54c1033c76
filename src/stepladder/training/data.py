"""What trainers share: what they are given, whom they tell, and where a killed training goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.records import Example

Report = Callable[[int, int, float], None]
"""Called with (optimiser steps done, steps in all, last loss)."""


class Data(NamedTuple):
    """What a member learns from, and what its validation loss is measured on (nothing: it is not measured)."""

    examples: Sequence[Example]
    held_out: Sequence[Example]


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
