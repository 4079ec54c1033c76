"""merged: each member's adapter folded into the base, and how far the result is from base and adapter side by side."""

from __future__ import annotations

from pathlib import Path

from stepladder import models, records
from stepladder.context import Context
from stepladder.records import Example
from stepladder.training import merging, swift
from stepladder.workspace import Artifact


def artifact(context: Context, part: str | None) -> Artifact:
    inputs = {
        "adapter": context.digest_of("adapter", part),
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
        merging.merge(base, adapter, folder)
    examples = records.read(context.input("trainset", part) / "train.jsonl", Example)
    merging.prove(base, adapter, folder, examples, settings.max_length, settings.dtype).write(folder)
