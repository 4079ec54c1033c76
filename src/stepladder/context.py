"""A run's configuration, folder and progress, which every stage is given; and which artifacts a run has."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stepladder import models
from stepladder.config import BASE, Config, Member, load
from stepladder.errors import UserError
from stepladder.mcq import prompts
from stepladder.progress import Progress
from stepladder.terminal import PlainConsole
from stepladder.workspace import RUNS, Artifact, Workspace

STAGES = (
    "questions", "samples", "variants", "trainset", "adapter", "merged", "quantised", "predictions", "ensemble",
    "report",
)  # fmt: skip
"""The stages in the order of the flow; each is the module of that name in ``stages/``."""
PER_MEMBER = {"trainset", "adapter", "merged", "quantised", "predictions"}
"""Stages that make an artifact for each member; the others make one for the run."""


@dataclass(frozen=True)
class Context:
    """A run: its configuration, folder and progress."""

    config: Config
    workspace: Workspace
    progress: Progress
    file: Path | None = None
    """The TOML file, as the user named it."""

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
        return cls(loaded, Workspace(runs, loaded.name), Progress(PlainConsole()), config)

    def input(self, stage: str, part: str | None = None) -> Path:
        """Folder of a finished artifact to read from."""
        return self.workspace.path(stage, part)

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
        for stage, part in artifacts(self.config):
            manifest = Artifact(self.input(stage, part), {}, {}).manifest()
            if manifest is not None and "dtype" in manifest:
                formats[label(stage, part)] = manifest["dtype"]
        return formats


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


def artifacts(config: Config) -> list[tuple[str, str | None]]:
    """Stage and part of every artifact of a run, in the order of the flow."""
    return [(stage, part) for stage in STAGES for part in parts(config, stage)]


def label(stage: str, part: str | None) -> str:
    """The name of an artifact in messages: ``stage`` or ``stage/part``."""
    return stage if part is None else f"{stage}/{part}"
