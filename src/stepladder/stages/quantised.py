"""quantised: quantised weights, and the verdict: what quantising cost on validation.

Weights that fail the gate are repaired, step by step, and measured again; the verdict lists every attempt. Final
weights take the form that passed.
"""

from __future__ import annotations

import functools
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
    FinalVerdict,
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
from stepladder.quantising.gate import Reference, distance, measure, measure_final, reference
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
    if context.is_final:
        inputs["chosen"] = context.chosen.digest_of("quantised", part)
    for general in config.quantise.general:
        if Path(general.source).is_file():
            inputs[f"general {general.source}"] = file_digest(Path(general.source))
    return Artifact(context.input("quantised", part), chosen_settings, inputs)


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
    if context.is_final:
        _build_final(context, part, folder)
        return
    config = context.config
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    before = reference(context, str(part), context.input("merged", part), questions)
    attempts: list[AttemptSummary] = []
    attempt_folder = folder / "attempt"
    last: Form | None = None
    rounding: dict[Form, Distance | None] = {}
    for name, form in _forms(context, part, attempt_folder):
        _make(context, part, form, last, attempt_folder)
        last = form
        if (plain := form.rounded()) not in rounding:
            rounding[plain] = _rounding(context, part, before, form, folder / "rounded")
        measured = measure(context, str(part), before, attempt_folder, rounding[plain])
        description = _described(name, form, attempt_folder)
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
    verdict = Verdict(
        form=description,
        dtype=_number_formats(context, part),
        **dict(measured),
        passed=True,
        gates={name: getattr(config.quantise, name) for name in ("max_loss", "max_unparsed", "max_kl")},
        attempts=tuple(attempts),
    )
    if verdict.accuracy is not None and verdict.accuracy.decision == "cannot tell":
        context.progress.say(f"quantised/{part} passes, but: {sentence(verdict.accuracy, config.quantise.max_orders)}")
    _finish(context, part, attempt_folder, verdict)


def _build_final(context: Context, part: str | None, folder: Path) -> None:
    """Final weights, in the form that was chosen; no repair is tried, since none could be chosen without labels that
    trained nobody."""
    chosen = verdict(context.chosen, part)
    form, attempt_folder = chosen_form(context.config.quantise, chosen), folder / "attempt"
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    before = reference(context, str(part), context.input("merged", part), questions)
    _make(context, part, form, None, attempt_folder)
    rounding = _rounding(context, part, before, form, folder / "rounded")
    measured = measure_final(context, str(part), before, attempt_folder, rounding, chosen)
    if measured.why:
        raise GateError(
            f"{context.label('quantised', part)}: {'; '.join(measured.why)}; final weights keep the form that was "
            "chosen, so choose [quantise] settings that lose less, or set final = 'none'"
        )
    final = FinalVerdict(
        form=_described(chosen.form.repair, form, attempt_folder),
        dtype=_number_formats(context, part),
        **dict(measured),
        passed=True,
        gates={name: getattr(context.config.quantise, name) for name in ("max_unparsed", "max_kl")},
    )
    _finish(context, part, attempt_folder, final)


def chosen_form(settings: Quantise, chosen: Verdict) -> Form:
    """The form that passed the gate: the configured one with what the repairs up to it have changed."""
    tried = [attempt.repair for attempt in chosen.attempts]
    method = "gptq" if "calibration" in tried else settings.method
    form = chosen.form
    changes = {"bits": form.bits, "group_size": form.group_size, "samples": form.samples, "method": method}
    return Form(settings.model_copy(update=changes), form.layers_in_8_bits, "recovery" in tried)


def _make(context: Context, part: str | None, form: Form, last: Form | None, quantised: Path) -> None:
    """Make weights of a form; ``last`` is the form of those that are there already, which recovery tunes."""
    if last is None or form != last._replace(recovery=True):
        _quantise(context, part, form, quantised)
    if form.recovery:
        _recover(context, part, form, quantised)
    gptq.inspect(quantised, form.settings, context.input("merged", part))


def _described(repair_name: Repair | str | None, form: Form, quantised: Path) -> QuantisedForm:
    return QuantisedForm(
        repair=repair_name,
        bits=form.settings.bits,
        group_size=gptq.claims(quantised)[0][1],
        samples=form.settings.samples,
        layers_in_8_bits=form.layers_in_8_bits,
    )


def _number_formats(context: Context, part: str | None) -> NumberFormats:
    return NumberFormats(
        trained=context.number_formats().get(context.label("adapter", part)),
        quantised=models.dtype_name(context.config.train.dtype),
        measured=models.dtype_name(context.config.predict.dtype),
    )


def _finish(context: Context, part: str | None, quantised: Path, verdict: Verdict | FinalVerdict) -> None:
    """Move the weights that passed to their place, and write what belongs to them."""
    folder = quantised.parent
    for path in quantised.iterdir():
        path.rename(folder / path.name)
    quantised.rmdir()
    verdict.write(folder)
    write_settings(context.config, folder)
    card = TrainsetCard.read(context.input("trainset", part))
    mix = member(context.config, part)
    base = models.locate(student_name(context.config, mix))
    write_atomic(folder / "README.md", model_card.markdown(context.config, mix, base, card, verdict))


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
    report = functools.partial(context.progress.update, "GPTQ")
    report(0, 1)
    shutil.rmtree(quantised, ignore_errors=True)
    quantised.mkdir()
    rows = calibration_rows(context, part, form)
    if form.settings.backend == "gptqmodel":
        gptqmodel.quantise(form.settings, context.config.train.swift.environment, merged, rows, quantised)
    else:
        dtype = context.config.train.dtype
        gptq.quantise(form.settings, merged, rows, quantised, form.layers_in_8_bits, dtype, report)


def _recover(context: Context, part: str | None, form: Form, quantised: Path) -> None:
    context.progress.update("recovery tuning", 0, 1)
    repair.recover(context.input("merged", part), quantised, own_rows(context, part, form), context.config.train.dtype)


def _rounding(context: Context, part: str | None, before: Reference, form: Form, folder: Path) -> Distance | None:
    """How far plain rounding into a form is from the merged weights: calibration must do no worse. None where that is
    no limit."""
    if form.settings.method == "rtn" or before.next_tokens is None:
        return None
    plain = form.rounded()
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
    """The verdict on a member's chosen quantised weights.

    Raises:
        UserError: the member is not quantised yet.
    """
    context.digest_of("quantised", member)
    return Verdict.read(context.input("quantised", member))
