"""quantised: 4-bit weights, and the verdict: what quantising cost on validation, measured before the model may pass.

What does not pass is repaired, step by step, and measured again; every attempt stands in the verdict.
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
from stepladder.records import Example, Question
from stepladder.reporting import model_card
from stepladder.stages.trainset import member
from stepladder.training.sequences import TokenRow, tokenise
from stepladder.workspace import Artifact, file_digest, write_atomic

SMALLEST = 32
"""Group size below which servers have no kernels."""


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    chosen = {"quantise": settings(config.quantise), "predict": settings(config.predict), "seed": config.seed}
    if config.train.dtype != "auto":
        chosen["dtype"] = config.train.dtype
    inputs = {
        "merged": context.digest_of("merged", part),
        "trainset": context.digest_of("trainset", part),
        "questions": context.digest_of("questions"),
    }
    for general in config.quantise.general:
        if Path(general.source).is_file():
            inputs[f"general {general.source}"] = file_digest(Path(general.source))
    return Artifact(context.workspace.path("quantised", part), chosen, inputs)


class Form(NamedTuple):
    """A way to quantise."""

    settings: Quantise
    eight: tuple[str, ...] = ()
    """Layers with 8 bits whatever the others have."""
    recovery: bool = False

    def rounded(self) -> Form:
        """The same by plain rounding, which looks at no calibration."""
        plain = {"method": "rtn", "samples": 1, "general": ()}
        return Form(self.settings.model_copy(update=plain), self.eight)


def build(context: Context, part: str | None, folder: Path) -> None:
    config = context.config
    merged = context.input("merged", part)
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    before = reference(context, str(part), merged, questions)
    attempts: list[AttemptSummary] = []
    made = folder / "attempt"
    last: Form | None = None
    rounding: dict[Form, Distance | None] = {}
    for name, form in _forms(context, part, made):
        if last is None or form != last._replace(recovery=True):  # a recovery goes on from what is there
            _quantise(context, part, form, made)
        if form.recovery:
            _recover(context, part, form, made)
        last = form
        gptq.inspect(made, form.settings, merged)
        if (plain := form.rounded()) not in rounding:
            worth = form.settings.method != "rtn" and before.next_tokens is not None
            rounding[plain] = _rounding(context, part, before, plain, folder / "rounded") if worth else None
        measured = measure(context, str(part), before, made, rounding[plain])
        described = QuantisedForm(
            repair=name,
            bits=form.settings.bits,
            group_size=gptq.claims(made)[0][1],
            samples=form.settings.samples,
            layers_in_8_bits=form.eight,
        )
        attempts.append(_summary(described, measured))
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
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    gates = {name: getattr(config.quantise, name) for name in ("max_loss", "max_unparsed", "max_kl")}
    dtype = NumberFormats(
        trained=context.number_formats().get(f"adapter/{part}"),
        quantised=models.dtype_name(config.train.dtype),
        measured=models.dtype_name(config.predict.dtype),
    )
    verdict = Verdict(form=described, dtype=dtype, **dict(measured), passed=True, gates=gates, attempts=tuple(attempts))
    verdict.write(folder)
    write_settings(config, folder)
    card = TrainsetCard.read(context.input("trainset", part))
    mix, base = member(config, part), models.locate(config.train.base)
    write_atomic(folder / "README.md", model_card.markdown(config, mix, base, card, verdict))


def _forms(context: Context, part: str | None, made: Path) -> Iterator[tuple[Repair | None, Form]]:
    """What is asked for, then what each repair makes of it; one that would change nothing is passed over."""
    form = Form(context.config.quantise)
    yield None, form
    for name in context.config.quantise.repairs:
        repaired = _repaired(context, part, name, form, made)
        if repaired != form:
            context.progress.say(f"quantised/{part}: tries to repair with {name!r}")
            form = repaired
            yield name, form


def _repaired(context: Context, part: str | None, name: Repair, form: Form, made: Path) -> Form:
    now, changes = form.settings, dict[str, Any]()
    if name == "recovery":
        return form._replace(recovery=True)
    if name == "mixed" and now.bits != 8 and now.backend != "gptqmodel":
        rows = calibration_rows(context, part, form)
        worst = repair.worst_layers(context.input("merged", part), made, rows, context.config.train.dtype)
        return form._replace(eight=tuple(worst))
    if name == "8bit":
        form, changes = form._replace(eight=()), {"bits": 8}
    elif name == "groups" and (half := gptq.claims(made)[0][1] // 2) >= SMALLEST:
        changes = {"group_size": half}
    elif name == "calibration":  # which is all that rounding lacks
        changes = {"method": "gptq"} if now.method == "rtn" else {"samples": 4 * now.samples}
    return form._replace(settings=now.model_copy(update=changes))


def _quantise(context: Context, part: str | None, form: Form, made: Path) -> None:
    merged = context.input("merged", part)
    context.progress.update("GPTQ", 0, 1)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    rows = calibration_rows(context, part, form)
    if form.settings.backend == "gptqmodel":
        gptqmodel.quantise(form.settings, context.config.train.swift.environment, merged, rows, made)
    else:
        gptq.quantise(form.settings, merged, rows, made, form.eight, context.config.train.dtype)


def _recover(context: Context, part: str | None, form: Form, made: Path) -> None:
    context.progress.update("recovery tuning", 0, 1)
    repair.recover(context.input("merged", part), made, own_rows(context, part, form), context.config.train.dtype)


def _rounding(context: Context, part: str | None, before: Reference, plain: Form, folder: Path) -> Distance | None:
    """How far from the merged weights rounding to nearest would be: what calibration must not be worse than."""
    folder.mkdir()
    merged, dtype = context.input("merged", part), context.config.train.dtype
    gptq.quantise(plain.settings, merged, [], folder, plain.eight, dtype)
    found = distance(context, before, folder)
    shutil.rmtree(folder)
    return found


def calibration_rows(context: Context, part: str | None, form: Form) -> list[list[int]]:
    """Token ids of whole texts, own chains first."""
    tokenizer = models.load_tokenizer(context.input("merged", part))
    rows = [row.ids for row in own_rows(context, part, form)]
    for index, general in enumerate(form.settings.general):
        rows += calibration.general(tokenizer, general, rng("general", context.config.seed, part, index))
    return rows


def own_rows(context: Context, part: str | None, form: Form) -> list[TokenRow]:
    """The member's own conversations that calibrate, as tokens."""
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
    """What quantising a member was measured to cost.

    Raises:
        UserError: the member is not quantised yet.
    """
    context.digest_of("quantised", member)
    return Verdict.read(context.input("quantised", member))
