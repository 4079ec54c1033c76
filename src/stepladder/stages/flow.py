"""The loop that builds every artifact that is not up to date."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol, cast

from stepladder import models
from stepladder.answering.client import check_ledger
from stepladder.config import Config
from stepladder.context import Context, Place, artifacts, parts
from stepladder.errors import AskError, MissingExtra, ModelError, UserError
from stepladder.forecast import model_shape
from stepladder.serving import cards, vllm
from stepladder.training.merging import refuse_quantised
from stepladder.workspace import Artifact, State

ON_CARDS = ("adapter", "merged", "quantised")
"""Stages that compute on this machine's cards beside no server of the run's."""


class Stage(Protocol):
    """The functions that the module of a stage has."""

    def artifact(self, context: Context, part: str | None) -> Artifact: ...

    def build(self, context: Context, part: str | None, folder: Path) -> None: ...


def stage(name: str) -> Stage:
    """The module of a stage, imported when it is needed."""
    return cast(Stage, importlib.import_module(f"stepladder.stages.{name}"))


def artifact_at(place: Place) -> Artifact:
    """The artifact at a place of the flow."""
    return stage(place.stage).artifact(place.context, place.part)


def run(context: Context, names: Collection[str] | None = None) -> None:
    """Bring the whole run up to date, in flow order, or the named stages of the chosen weights.

    Raises:
        LedgerError: the ledger is damaged.
    """
    is_checked = False
    for place in artifacts(context):
        owner, name, part = place
        if names is not None and (owner.is_final or name not in names):
            continue
        artifact = artifact_at(place)
        if artifact.state() == "done":
            context.progress.up_to_date(place.label)
            continue
        if not is_checked:
            check_ledger(context.workspace.ledger, context.progress.say)
            is_checked = True
        for file in artifact.edited():
            context.progress.say(f"{place.label}: {file} was changed since it was made; it is made again")
        dtype = computes_in(context.config, name, part)
        if dtype is not None:
            _note_other_formats(context, place, dtype)
        for line in cards.taken() if name in ON_CARDS else ():
            context.progress.say(f"{place.label}: {line}; if that is a server of yours, end it")
        try:
            with context.progress.stage(place.label), artifact.writing(dtype) as folder:
                stage(name).build(owner, part, folder)
        finally:
            models.release_cards()


def computes_in(config: Config, name: str, part: str | None) -> str | None:
    """The number format that a stage computes in on this machine; None where it computes nothing in this process, or
    PyTorch is not installed, which is no error where the ledger has every answer."""
    finished = any(member.name == part and member.path is not None for member in config.member)
    if finished and (name == "adapter" or (name == "merged" and part not in parts(config, "adapter"))):
        return None  # it is copied
    local = any(config.models[model].engine == "local" for model in models_asked(config, name))
    with contextlib.suppress(MissingExtra):
        if name in ("adapter", "merged", "quantised"):
            return models.dtype_name(config.train.dtype)
        if local or (name == "predictions" and config.predict.engine == "local"):
            return models.dtype_name(config.predict.dtype)
    return None


def models_asked(config: Config, name: str) -> list[str]:
    """The models, by their names under ``[models]``, that a stage asks."""
    if name == "samples":
        return [model for rung in config.rung for model in rung.models]
    if name == "variants" and config.variants is not None:
        return [*config.variants.models, *(config.variants.judges or config.models)]
    return []


def missing_keys(config: Config, name: str) -> dict[str, str]:
    """Environment variables with API keys that a stage needs and that are not set, each with a model that needs it."""
    models_by_variable: dict[str, str] = {}
    for model in models_asked(config, name):
        variable = config.models[model].api_key_env
        if variable is not None and not os.environ.get(variable):
            models_by_variable.setdefault(variable, model)
    return models_by_variable


def check_keys(context: Context) -> None:
    """Check that the API keys are set of all models that a run still has to ask.

    Raises:
        AskError: naming the first variable that is not set, and its model.
    """
    to_do = [(place, state) for place, state in states(context) if state != "done"]
    for position, (place, state) in enumerate(to_do):
        if state == "stale" and position > 0:
            continue  # once the artifacts before it are made again, it may prove to be up to date
        for variable, model in missing_keys(context.config, place.stage).items():
            raise AskError(
                f"model {model!r}: environment variable {variable} is not set, and {place.label} will ask this model; "
                "put the key there"
            )


def check_finished(context: Context) -> None:
    """Check that finished models and adapters of the user's own are there and can be used, before anything is spent.

    Raises:
        ModelError: one is not, or it is quantised already.
    """
    for member in context.config.member:
        if member.path is not None and models.is_adapter(member.path):
            models.locate_adapter(member.path)
        elif member.path is not None:
            refuse_quantised(models.locate(member.path))


def check_kernels(context: Context) -> None:
    """Check that vLLM, where it is to answer on this machine, can compute the weights that will be made.

    Raises:
        ServeError: it cannot; nothing has been run.
    """
    config = context.config
    is_here = config.predict.engine == "vllm" and not config.serve.base_url and config.cluster is None
    if is_here and not cards.visible_cards():
        vllm.check_kernels(None)


def check_group_size(context: Context) -> None:
    """Check that ``[quantise] group_size`` divides the widths of a base that is a folder here.

    Raises:
        UserError: it does not; nothing has been run.
    """
    size, base = context.config.quantise.group_size, context.config.train.base
    folder = models.locate(base) if base == models.BUNDLED else Path(base).expanduser()
    if size is None or not folder.is_dir():
        return
    try:
        shape = model_shape.read(folder)
    except ModelError:  # an architecture whose layers are not known
        return
    for linear in shape.linears:
        if linear.inputs % size:
            raise UserError(
                f"[quantise] group_size {size} does not divide the {linear.inputs} inputs of a layer of {base}; use a "
                "divisor"
            )


def check_inputs(context: Context, name: str) -> None:
    """Check that the artifacts before a stage are up to date: one that is there may have been made from a file that
    has changed since. One that is missing is left to the stage that reads it.

    Raises:
        UserError: naming the first artifact that is not up to date.
    """
    for before in artifacts(context):
        if before.stage == name or not before.folder.exists():
            return
        if artifact_at(before).state() != "done":
            raise UserError(
                f"{before.label} is not up to date, since what it was made from has changed, so {name} cannot be; run "
                f"'{context.run_command}'"
            )


def _note_other_formats(context: Context, place: Place, dtype: str) -> None:
    """Note that artifacts made before were computed in another number format."""
    formats = context.number_formats()
    others = {name: other for name, other in formats.items() if other != dtype and name != place.label}
    if others:
        table = "predict" if place.stage in {"samples", "variants", "predictions"} else "train"
        context.progress.say(
            f"{place.label} is computed in {dtype}, and {', '.join(others)} {'were' if len(others) > 1 else 'was'} in "
            f"{' and '.join(sorted({*others.values()}))}; set dtype in [{table}] to use one for the whole run"
        )


def states(context: Context) -> Iterator[tuple[Place, State]]:
    """Every artifact of the run with its state. All after the first that is not done are stale, or missing where there
    is no folder: their fingerprints need its digest."""
    unfinished = False
    for place in artifacts(context):
        if unfinished:
            yield place, "stale" if place.folder.exists() else "missing"
            continue
        state = artifact_at(place).state()
        unfinished = state != "done"
        yield place, state
