"""What every stage shares: the context it works in, and the loop that runs what is not done."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from stepladder import models
from stepladder.config import Config
from stepladder.errors import MissingExtra
from stepladder.mcq import prompts
from stepladder.progress import Progress
from stepladder.workspace import Artifact, State, Workspace

NAMES = (
    "questions", "samples", "variants", "trainset", "adapter", "merged", "quantised", "predictions", "ensemble",
    "report",
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """One run at work."""

    config: Config
    workspace: Workspace
    progress: Progress

    def input(self, stage: str, part: str | None = None) -> Path:
        """Folder of a finished artifact to read from."""
        return self.workspace.path(stage, part)


class Stage(Protocol):
    """What a stage module offers."""

    def parts(self, config: Config) -> tuple[str | None, ...]: ...

    def artifact(self, context: Context, part: str | None) -> Artifact: ...

    def build(self, context: Context, part: str | None, folder: Path) -> None: ...


def stage(name: str) -> Stage:
    """The module of a stage, imported when it is needed."""
    return cast(Stage, importlib.import_module(f"stepladder.stages.{name}"))


def digest_of(context: Context, name: str, part: str | None = None) -> str:
    """Digest of a finished artifact, for the inputs of a later one."""
    return stage(name).artifact(context, part).digest()


def templates(context: Context) -> dict[str, str]:
    """The user's prompts, for the inputs of a stage that asks or trains with them."""
    folder = context.config.prompts
    return {} if folder is None else {"prompts": prompts.fingerprint(folder)}


def members(config: Config) -> tuple[str | None, ...]:
    """The parts of a stage that exists once per member."""
    return tuple(member.name for member in config.member)


def run(context: Context, names: tuple[str, ...] = NAMES) -> None:
    """Bring the named stages up to date, in flow order."""
    for name in NAMES:
        if name not in names:
            continue
        module = stage(name)
        for part in module.parts(context.config):
            artifact = module.artifact(context, part)
            label = name if part is None else f"{name}/{part}"
            if artifact.state() == "done":
                context.progress.up_to_date(label)
                continue
            dtype = computes_in(context.config, name)
            if dtype is not None:
                _say_what_differs(context, label, dtype)
            with context.progress.stage(label), artifact.writing(dtype) as folder:
                module.build(context, part, folder)


def computes_in(config: Config, name: str) -> str | None:
    """The number format a stage computes in on this machine; None where it computes nothing in this process, or PyTorch
    is not there, which is not missed where the ledger knows every answer."""
    asked: list[str] = []
    if name == "samples":
        asked = [model for rung in config.rung for model in rung.models]
    elif name == "variants" and config.variants is not None:
        asked = [*config.variants.models, *(config.variants.judges or config.models)]
    local = any(config.models[model].engine == "local" for model in asked)
    with contextlib.suppress(MissingExtra):
        if name in ("adapter", "merged", "quantised"):
            return models.dtype_name(config.train.dtype)
        if local or (name == "predictions" and config.predict.engine == "local"):
            return models.dtype_name(config.predict.dtype)
    return None


def made_in(context: Context) -> dict[str, str]:
    """The number format that each finished artifact was computed in, as far as it was computed in this process."""
    found = {}
    for name in NAMES:
        for part in stage(name).parts(context.config):
            manifest = Artifact(context.workspace.path(name, part), {}, {}).manifest() or {}
            if "dtype" in manifest:
                found[name if part is None else f"{name}/{part}"] = manifest["dtype"]
    return found


def _say_what_differs(context: Context, label: str, dtype: str) -> None:
    """Say that a run goes on in another number format than it was made in."""
    others = {other: before for other, before in made_in(context).items() if before != dtype and other != label}
    if others:
        table = "predict" if label.startswith(("samples", "variants", "predictions")) else "train"
        context.progress.say(
            f"{label} is computed in {dtype}, and {', '.join(others)} {'were' if len(others) > 1 else 'was'} in "
            f"{' and '.join(sorted({*others.values()}))}; dtype in [{table}] holds a run to one"
        )


def states(context: Context) -> Iterator[tuple[str, State]]:
    """Every artifact of the run with its state. An artifact whose input is not there is missing or stale itself."""
    broken = False
    for name in NAMES:
        module = stage(name)
        for part in module.parts(context.config):
            label = name if part is None else f"{name}/{part}"
            if broken:
                folder = context.workspace.path(name, part)
                yield label, "stale" if folder.exists() else "missing"
                continue
            state = module.artifact(context, part).state()
            broken = state != "done"
            yield label, state
