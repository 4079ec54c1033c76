"""merged: each member's adapter folded into the base."""

from __future__ import annotations

from pathlib import Path

from stepladder import models
from stepladder.stages.flow import Context, digest_of, members
from stepladder.training import swift, trl
from stepladder.workspace import Artifact

parts = members


def artifact(context: Context, part: str | None) -> Artifact:
    inputs = {
        "adapter": digest_of(context, "adapter", part),
        "base": models.content_digest(models.locate(context.config.train.base)),
    }
    backend = context.config.train.backend
    # The default is not named, so that what was merged before there was another stays fresh.
    return Artifact(context.workspace.path("merged", part), {} if backend == "trl" else {"backend": backend}, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    settings = context.config.train
    base, adapter = models.locate(settings.base), context.input("adapter", part)
    if settings.backend == "swift":
        swift.merge(settings, base, adapter, folder)
    else:
        trl.merge(base, adapter, folder)
