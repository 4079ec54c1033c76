"""A run's configuration, folder and progress, which every stage is given; and which artifacts a run has."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from stepladder import models
from stepladder.config import BASE, Config, Member, load
from stepladder.documents import EnsembleChoice
from stepladder.errors import UserError
from stepladder.mcq import prompts
from stepladder.progress import Heartbeat, Progress
from stepladder.records import Split
from stepladder.terminal import PlainConsole
from stepladder.workspace import RUNS, Artifact, Workspace

STAGES = (
    "questions", "samples", "variants", "trainset", "adapter", "merged", "quantised", "predictions", "ensemble",
    "report",
)  # fmt: skip
"""The stages in the order of the flow; each is the module of that name in ``stages/``."""
PER_MEMBER = {"trainset", "adapter", "merged", "quantised", "predictions"}
"""Stages that make an artifact for each member; the others make one for the run."""
FINAL = "final"
"""Folder of a run that has the artifacts of its final weights (``final = "all"``)."""
FINAL_STAGES = STAGES[1:-1]
"""Stages that are run once more for the final weights."""


@dataclass(frozen=True)
class Context:
    """A run: its configuration, folder and progress."""

    config: Config
    workspace: Workspace
    progress: Progress
    file: Path | None = None
    """The TOML file, as the user named it."""
    is_final: bool = False
    """Whether it is about the final weights, which learn from all labels and whose artifacts are below ``final/``; else
    it is about the chosen ones, by which every choice is made."""

    @classmethod
    def open(cls, config: Path, runs: Path) -> Context:
        """The run of a TOML file, with its progress on standard output.

        Raises:
            ConfigError: the file cannot be read or is not valid.
            UserError: ``runs`` is not a folder.
        """
        loaded = load(config)
        if runs.exists() and not runs.is_dir():
            raise UserError(f"{runs}: is not a folder; give --runs a folder; it is made if it does not exist")
        ledger = None if loaded.cluster is None else loaded.cluster.ledger
        workspace = Workspace(runs, loaded.name, ledger)
        return cls(loaded, workspace, Progress(PlainConsole(), heartbeat=Heartbeat(workspace.heartbeat)), config)

    @property
    def chosen(self) -> Context:
        """The same run, about the chosen weights."""
        return replace(self, is_final=False)

    @property
    def final(self) -> Context:
        """The same run, about the final weights."""
        return replace(self, is_final=True)

    @property
    def taught(self) -> tuple[Split, ...]:
        """The splits whose labels train. The questions of the last one climb the ladder; the others did before."""
        return ("train", "validation") if self.is_final else ("train",)

    @property
    def sources(self) -> tuple[Context, ...]:
        """The contexts whose samples and variants are learned from."""
        return (self.chosen, self) if self.is_final else (self,)

    def input(self, stage: str, part: str | None = None) -> Path:
        """Folder of an artifact."""
        return self.workspace.path(self._folder(stage), part)

    def label(self, stage: str, part: str | None = None) -> str:
        """The name of an artifact in messages, which is its folder in the run: ``[final/]stage[/part]``."""
        return "/".join(filter(None, (self._folder(stage), part)))

    def place(self, stage: str, part: str | None = None) -> Place:
        """Where an artifact of these weights stands in the flow."""
        return Place(self, stage, part)

    def _folder(self, stage: str) -> str:
        return f"{FINAL}/{stage}" if self.is_final and stage in FINAL_STAGES else stage

    def digest_of(self, stage: str, part: str | None = None) -> str:
        """Digest of a finished artifact, for the inputs of a later one.

        Raises:
            UserError: it is not there yet.
        """
        return Artifact(self.input(stage, part), {}, {}).digest(self.run_command)

    @property
    def run_command(self) -> str:
        """The command that brings the run up to date, for messages."""
        words = ["stepladder", "run"]
        if self.file is not None:
            words.append(str(self.file))
            if self.workspace.runs != RUNS:
                words += ["--runs", str(self.workspace.runs)]
        return shlex.join(words)

    def prompts_digest(self) -> dict[str, str]:
        """Digest of the templates that the student is asked with, for the inputs of a stage that uses them; empty for
        the packaged ones."""
        folder = self.config.student_prompts
        return {} if folder is None else {"prompts": prompts.fingerprint(folder)}

    def prompts_of(self, names: Iterable[str]) -> dict[str, str]:
        """The same for the templates that models under ``[models]`` are asked with."""
        folders = {name: self.config.prompts_for(name) for name in names}
        return {
            "prompts" if folder == self.config.prompts else f"prompts of {name}": prompts.fingerprint(folder)
            for name, folder in folders.items()
            if folder is not None
        }

    def number_formats(self) -> dict[str, str]:
        """The number format that each finished artifact was computed in; without those that servers computed."""
        formats = {}
        for place in artifacts(self):
            manifest = Artifact(place.folder, {}, {}).manifest()
            if manifest is not None and "dtype" in manifest:
                formats[place.label] = manifest["dtype"]
        return formats


class Place(NamedTuple):
    """Where an artifact stands in the flow."""

    context: Context
    """About the weights that it belongs to."""
    stage: str
    part: str | None

    @property
    def label(self) -> str:
        """The artifact's name in messages."""
        return self.context.label(self.stage, self.part)

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        return self.context.input(self.stage, self.part)


def parts(config: Config, stage: str) -> tuple[str | None, ...]:
    """The parts of a stage in a run: names of folders below the stage's, or None for the stage's folder itself."""
    if stage == "variants" and config.variants is None:
        return ()
    if stage not in PER_MEMBER:
        return (None,)
    members = tuple(member.name for member in config.member if stage != "adapter" or has_adapter(member))
    return (BASE, *members) if stage == "predictions" else members


def has_adapter(member: Member) -> bool:
    """Whether a member is the base with an adapter, trained here or finished; else it is a finished model."""
    return member.path is None or models.is_adapter(member.path)


def artifacts(context: Context) -> Iterator[Place]:
    """Every artifact of a run, in the order of the flow. Members that have final weights are those whose answers the
    ensemble uses, so they are known once it is there; before, all are listed."""
    chosen = context.chosen
    for stage in STAGES[:-1]:
        for part in parts(context.config, stage):
            yield Place(chosen, stage, part)
    if context.config.final == "all":
        for stage in FINAL_STAGES:
            for part in _final_parts(context, stage):
                yield Place(context.final, stage, part)
    yield Place(chosen, STAGES[-1], None)


def _final_parts(context: Context, stage: str) -> tuple[str | None, ...]:
    """The parts of a stage that is run once more for the final weights."""
    names = final_members(context)
    if stage in PER_MEMBER:
        return names
    learns_variants = any(member.variants for member in context.config.member if member.name in names)
    return (None,) if stage != "variants" or learns_variants else ()


def final_members(context: Context) -> tuple[str, ...]:
    """Names of the members whose answers the ensemble uses; of all while it is not there."""
    ensemble = context.chosen.input("ensemble")
    if not (ensemble / EnsembleChoice.FILE).is_file():
        return tuple(member.name for member in context.config.member)
    return EnsembleChoice.read(ensemble).answering
