"""quantised: quantised weights, and the verdict: what quantising cost on validation.

Weights that fail the gate are repaired, step by step, and measured again; the verdict lists every attempt.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import models, records
from stepladder.answering.standalone import write_settings
from stepladder.config import Quantise, Repair, settings
from stepladder.context import Context
from stepladder.documents import (
    AttemptSummary,
    Distance,
    FlipCounts,
    Measurement,
    NumberFormats,
    QuantisedForm,
    TrainsetCard,
    Verdict,
)
from stepladder.errors import GateError
from stepladder.mcq.shuffle import rng
from stepladder.quantising import calibration, gptq, gptqmodel, repair
from stepladder.quantising.gate import Reference, distance, measure, reference
from stepladder.quantising.margin import sentence
from stepladder.records import Example, Question
from stepladder.reporting import model_card
from stepladder.reporting.data_card import student_name
from stepladder.stages.trainset import member
from stepladder.training.sequences import TokenRow, tokenise
from stepladder.workspace import Artifact, file_digest, write_atomic

MIN_GROUP_SIZE = 32
"""For a repair; below it servers have no kernels."""


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    chosen_settings = {"quantise": settings(config.quantise), "predict": settings(config.predict), "seed": config.seed}
    if config.train.dtype != "auto":
        chosen_settings["dtype"] = config.train.dtype
    inputs = {
        "merged": context.digest_of("merged", part),
        "trainset": context.digest_of("trainset", part),
        "questions": context.digest_of("questions"),
    }
    for general in config.quantise.general:
        if Path(general.source).is_file():
            inputs[f"general {general.source}"] = file_digest(Path(general.source))
    return Artifact(context.workspace.path("quantised", part), chosen_settings, inputs)


class Form(NamedTuple):
    """How weights are quantised: the settings, and what repairs have changed."""

    settings: Quantise
    layers_in_8_bits: tuple[str, ...] = ()
    """Names of layers with 8 bits whatever the others have."""
    recovery: bool = False
    """Whether norms are tuned after quantising."""

    def rounded(self) -> Form:
        """The same form by plain rounding, which needs no calibration."""
        plain = {"method": "rtn", "samples": 1, "general": ()}
        return Form(self.settings.model_copy(update=plain), self.layers_in_8_bits)


def build(context: Context, part: str | None, folder: Path) -> None:
    config = context.config
    merged = context.input("merged", part)
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    before = reference(context, str(part), merged, questions)
    attempts: list[AttemptSummary] = []
    attempt_folder = folder / "attempt"
    last: Form | None = None
    rounding: dict[Form, Distance | None] = {}
    for name, form in _forms(context, part, attempt_folder):
        if last is None or form != last._replace(recovery=True):  # recovery tunes the last attempt's weights
            _quantise(context, part, form, attempt_folder)
        if form.recovery:
            _recover(context, part, form, attempt_folder)
        last = form
        gptq.inspect(attempt_folder, form.settings, merged)
        if (plain := form.rounded()) not in rounding:
            is_limit = form.settings.method != "rtn" and before.next_tokens is not None
            rounding[plain] = _rounding(context, part, before, plain, folder / "rounded") if is_limit else None
        measured = measure(context, str(part), before, attempt_folder, rounding[plain])
        description = QuantisedForm(
            repair=name,
            bits=form.settings.bits,
            group_size=gptq.claims(attempt_folder)[0][1],
            samples=form.settings.samples,
            layers_in_8_bits=form.layers_in_8_bits,
        )
        attempts.append(_summary(description, measured))
        if not measured.why:
            break
        context.progress.say(f"quantised/{part}: {'; '.join(measured.why)}")
    else:
        why = "; ".join(attempts[-1].why)
        tried = ", ".join(str(attempt.repair) for attempt in attempts[1:]) or "none"
        raise GateError(
            f"quantised/{part}: {why} (repairs tried: {tried}); raise samples, lower group_size, use 8 bits, or name "
            "more [quantise] repairs"
        )
    for path in attempt_folder.iterdir():
        path.rename(folder / path.name)
    attempt_folder.rmdir()
    gates = {name: getattr(config.quantise, name) for name in ("max_loss", "max_unparsed", "max_kl")}
    dtype = NumberFormats(
        trained=context.number_formats().get(f"adapter/{part}"),
        quantised=models.dtype_name(config.train.dtype),
        measured=models.dtype_name(config.predict.dtype),
    )
    verdict = Verdict(
        form=description, dtype=dtype, **dict(measured), passed=True, gates=gates, attempts=tuple(attempts)
    )
    verdict.write(folder)
    if verdict.accuracy is not None and verdict.accuracy.decision == "cannot tell":
        context.progress.say(f"quantised/{part} passes, but: {sentence(verdict.accuracy, config.quantise.max_orders)}")
    write_settings(config, folder)
    card = TrainsetCard.read(context.input("trainset", part))
    mix = member(config, part)
    base = models.locate(student_name(config, mix))
    write_atomic(folder / "README.md", model_card.markdown(config, mix, base, card, verdict))


def _forms(context: Context, part: str | None, quantised: Path) -> Iterator[tuple[Repair | None, Form]]:
    """The form that the configuration asks for, then each repair applied to the form before it; a repair that would
    change nothing is skipped."""
    form = Form(context.config.quantise)
    yield None, form
    for name in context.config.quantise.repairs:
        repaired = _repaired(context, part, name, form, quantised)
        if repaired != form:
            context.progress.say(f"quantised/{part}: trying the repair {name!r}")
            form = repaired
            yield name, form


def _repaired(context: Context, part: str | None, name: Repair, form: Form, quantised: Path) -> Form:
    settings, changes = form.settings, dict[str, Any]()
    if name == "recovery":
        return form._replace(recovery=True)
    if name == "mixed" and settings.bits != 8 and settings.backend != "gptqmodel":
        rows = calibration_rows(context, part, form)
        worst = repair.worst_layers(context.input("merged", part), quantised, rows, context.config.train.dtype)
        return form._replace(layers_in_8_bits=tuple(worst))
    if name == "8bit":
        form, changes = form._replace(layers_in_8_bits=()), {"bits": 8}
    elif name == "groups" and (half := gptq.claims(quantised)[0][1] // 2) >= MIN_GROUP_SIZE:
        changes = {"group_size": half}
    elif name == "calibration":  # plain rounding has none
        changes = {"method": "gptq"} if settings.method == "rtn" else {"samples": 4 * settings.samples}
    return form._replace(settings=settings.model_copy(update=changes))


def _quantise(context: Context, part: str | None, form: Form, quantised: Path) -> None:
    merged = context.input("merged", part)
    context.progress.update("GPTQ", 0, 1)
    shutil.rmtree(quantised, ignore_errors=True)
    quantised.mkdir()
    rows = calibration_rows(context, part, form)
    if form.settings.backend == "gptqmodel":
        gptqmodel.quantise(form.settings, context.config.train.swift.environment, merged, rows, quantised)
    else:
        gptq.quantise(form.settings, merged, rows, quantised, form.layers_in_8_bits, context.config.train.dtype)


def _recover(context: Context, part: str | None, form: Form, quantised: Path) -> None:
    context.progress.update("recovery tuning", 0, 1)
    repair.recover(context.input("merged", part), quantised, own_rows(context, part, form), context.config.train.dtype)


def _rounding(context: Context, part: str | None, before: Reference, plain: Form, folder: Path) -> Distance | None:
    """How far plain rounding is from the merged weights: calibration must do no worse."""
    folder.mkdir()
    merged, dtype = context.input("merged", part), context.config.train.dtype
    gptq.quantise(plain.settings, merged, [], folder, plain.layers_in_8_bits, dtype)
    rounding = distance(context, before, folder)
    shutil.rmtree(folder)
    return rounding


def calibration_rows(context: Context, part: str | None, form: Form) -> list[list[int]]:
    """Token ids of the calibration texts: the member's own conversations first, then general text."""
    tokenizer = models.load_tokenizer(context.input("merged", part))
    rows = [row.ids for row in own_rows(context, part, form)]
    for index, general in enumerate(form.settings.general):
        rows += calibration.general(tokenizer, general, rng("general", context.config.seed, part, index))
    return rows


def own_rows(context: Context, part: str | None, form: Form) -> list[TokenRow]:
    """The member's own conversations for calibration, as tokens."""
    examples = records.read(context.input("trainset", part) / "train.jsonl", Example)
    draw = rng("calibration", context.config.seed, part)
    drawn = draw.sample(examples, min(form.settings.samples, len(examples)))
    tokenizer = models.load_tokenizer(context.input("merged", part))
    return tokenise(tokenizer, drawn, context.config.train.max_length)


def _summary(form: QuantisedForm, measured: Measurement) -> AttemptSummary:
    return AttemptSummary(
        **dict(form),
        quantised=measured.quantised,
        flips=FlipCounts(
            right_to_wrong=measured.flips.right_to_wrong,
            wrong_to_right=measured.flips.wrong_to_right,
            p=measured.flips.p,
        ),
        unparsed=measured.unparsed.quantised,
        kl=None if measured.distance is None else measured.distance.kl,
        rounding_kl=measured.rounding_kl,
        bytes=measured.bytes.quantised,
        why=measured.why,
    )


def verdict(context: Context, member: str | None) -> Verdict:
    """The verdict on a member's quantised weights.

    Raises:
        UserError: the member is not quantised yet.
    """
    context.digest_of("quantised", member)
    return Verdict.read(context.input("quantised", member))
