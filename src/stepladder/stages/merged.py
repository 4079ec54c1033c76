"""merged: fold each member's adapter into the base, and measure how far the result is from base plus adapter. A
finished model is copied."""

from __future__ import annotations

from pathlib import Path

from stepladder import models, records
from stepladder.context import Context, has_adapter
from stepladder.records import Example
from stepladder.stages.trainset import member
from stepladder.training import merging, swift
from stepladder.workspace import Artifact


def artifact(context: Context, part: str | None) -> Artifact:
    if (model := _finished_model(context, part)) is not None:
        return Artifact(context.input("merged", part), {}, {"model": models.content_digest(model)})
    inputs = {
        "adapter": context.digest_of("adapter", part),
        "base": models.content_digest(models.locate(context.config.train.base)),
    }
    backend = context.config.train.backend
    # The default backend is left out of the fingerprint, so that folders merged before there was a choice stay valid.
    return Artifact(context.input("merged", part), {} if backend == "trl" else {"backend": backend}, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    if (model := _finished_model(context, part)) is not None:
        merging.adopt(model, folder)
        return
    settings = context.config.train
    base, adapter = models.locate(settings.base), context.input("adapter", part)
    if settings.backend == "swift":
        swift.merge(settings, base, adapter, folder)
    else:
        merging.merge(base, adapter, folder)
    examples = records.read(context.input("trainset", part) / "train.jsonl", Example)
    merging.prove(base, adapter, folder, examples, settings.max_length, settings.dtype).write(folder)


def _finished_model(context: Context, part: str | None) -> Path | None:
    """The folder of a member that is a finished model; None for one with an adapter."""
    mix = member(context.config, part)
    return None if mix.path is None or has_adapter(mix) else models.locate(mix.path)
