"""merged: each member's adapter folded into the base."""

from __future__ import annotations

from pathlib import Path

from stepladder import models
from stepladder.stages.flow import Context, digest_of, members
from stepladder.training import trl
from stepladder.workspace import Artifact

parts = members


def artifact(context: Context, part: str | None) -> Artifact:
    inputs = {
        "adapter": digest_of(context, "adapter", part),
        "base": models.content_digest(models.locate(context.config.train.base)),
    }
    return Artifact(context.workspace.path("merged", part), {}, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    trl.merge(models.locate(context.config.train.base), context.input("adapter", part), folder)
