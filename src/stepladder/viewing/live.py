"""How far a run is, from its folder and its ledger alone."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.ask.ledger import Ledger
from stepladder.ask.ledger.entries import Account
from stepladder.context import Context, Place, artifacts
from stepladder.errors import StepladderError
from stepladder.records import read
from stepladder.reporting.content import TrainingStep
from stepladder.workspace import MANIFEST

TRAINING_LOG = "log.jsonl"
RATE_SECONDS = 60.0
"""Over which tokens and dollars a second are counted."""
QUIET_SECONDS = 30.0
"""Without anything new, and it is said."""


class StageState(NamedTuple):
    """An artifact of the run."""

    label: str
    state: str
    """``done``, ``running`` or ``not yet``."""


class Failure(NamedTuple):
    """A request that brought no answer."""

    model: str
    outcome: str
    message: str
    age: float
    """Seconds."""


class Spending(NamedTuple):
    """What a run's ledger says."""

    accounts: Sequence[Account]
    in_flight: int
    spent: float
    """Dollars, of what is answered and what is in flight."""
    tokens_a_second: float
    dollars_an_hour: float
    failures: Sequence[Failure]


class Live(NamedTuple):
    """How far a run is."""

    is_running: bool
    stages: Sequence[StageState]
    beat: Mapping[str, Any]
    """What the command that works on it has said last; empty if nothing works."""
    quiet: float | None
    """Seconds since anything moved, if that is long ago."""
    spending: Spending | None


def look(context: Context) -> Live:
    """How far a run is at the moment."""
    is_running = context.workspace.is_locked()
    beat = _beat(context) if is_running else {}
    stages = [StageState(place.label, _state(place, beat)) for place in artifacts(context)]
    quiet = time.time() - float(beat["time"]) if beat else None
    return Live(is_running, stages, beat, quiet if quiet and quiet > QUIET_SECONDS else None, _spending(context))


def losses(context: Context) -> dict[str, Sequence[TrainingStep]]:
    """The log of every member that has been trained, by its name."""
    found = {}
    for place in artifacts(context):
        log = place.folder / TRAINING_LOG
        if place.stage == "adapter" and (place.folder / MANIFEST).exists() and log.exists():
            found[f"{'final ' if place.context.is_final else ''}{place.part}"] = _log(log, log.stat().st_mtime_ns)
    return found


@functools.lru_cache(maxsize=64)
def _log(path: Path, changed: int) -> Sequence[TrainingStep]:
    return read(path, TrainingStep)


def _state(place: Place, beat: Mapping[str, Any]) -> str:
    """Whether an artifact is there; if it is out of date is not looked at, which would read its inputs."""
    if place.label == beat.get("stage"):
        return "running"
    return "done" if (place.folder / MANIFEST).exists() else "not yet"


def _beat(context: Context) -> Mapping[str, Any]:
    try:
        beat = json.loads(context.workspace.heartbeat.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return beat if isinstance(beat, dict) and isinstance(beat.get("time"), (int, float)) else {}


def _spending(context: Context) -> Spending | None:
    """None where there is no ledger, or it cannot be read at the moment."""
    path, run = context.workspace.ledger, context.workspace.name
    if not path.exists():
        return None
    try:
        with Ledger(path, read_only=True) as ledger:
            recent = ledger.recent(run, RATE_SECONDS)
            return Spending(
                ledger.accounts(run), len(ledger.unsettled(run)), ledger.spent(run) / 1e6,
                recent.completion_tokens / RATE_SECONDS, recent.micro_dollars / 1e6 * 3600 / RATE_SECONDS,
                [Failure(*row) for row in recent.failures],
            )  # fmt: skip
    except StepladderError:
        return None
