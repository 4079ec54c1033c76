"""``stepladder plan``: an optional pilot, the forecast as tables, and once the cascade is done, the comparison."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from stepladder import models, records
from stepladder.answering.cascade import Cascade, Usage
from stepladder.ask.ledger import Account, Ledger
from stepladder.config import Config
from stepladder.context import Context, artifacts, final_members
from stepladder.errors import UserError
from stepladder.forecast import cost_tables, fit_tables, model_shape
from stepladder.forecast.cost import (
    ANSWER_TOKENS,
    ONE,
    PILOT_FACTOR,
    ModelRates,
    Rates,
    assume,
    forecast,
    prompt_tokens,
    solved_share,
    text_tokens,
)  # fmt: skip
from stepladder.forecast.datasheets import parse_card
from stepladder.forecast.fit_tables import Terms
from stepladder.forecast.memory import GIB
from stepladder.forecast.model_shape import Shape
from stepladder.forecast.workload import Workload
from stepladder.mcq.shuffle import rng
from stepladder.models import hubs
from stepladder.models.files import read_json
from stepladder.nodes.chosen import nodes_of
from stepladder.progress import duration
from stepladder.quantising import gptq
from stepladder.records import Question, Sample
from stepladder.stages import flow, samples
from stepladder.terminal import say
from stepladder.workspace import Artifact

ONCE_MORE = ("adapter", "merged", "quantised", "predictions")
"""Stages that take hours, and that final weights go through once more."""


def plan(
    config: Path,
    runs: Path,
    pilot: int,
    card: str,
    hours: float,
    rate: float | None,
    megabits: float,
    *,
    questions: int | None = None,
    servers: int | None = None,
    card_price: float | None = None,
    rehearse: bool = False,
) -> None:
    """Print what the cascade will ask, take and cost, and whether the members fit a card. First, so many ``pilot``
    questions are really asked; the ledger keeps their answers, so the run does not pay for them again. With
    ``rehearse`` the steps are also done on fake tensors, without weights, and the plan's memory is held against that.

    Args:
        config: the run's TOML file.
        runs: the folder of all runs.
        pilot: how many questions are asked first.
        card: that answers.
        hours: that all members may take.
        rate: tokens a second that a member was measured to write there.
        megabits: Mbit/s at which weights arrive.
        questions: to answer, such as those of this run; by default as many as the run's.
        servers: that answer at once; by default as many as the nodes of ``[cluster]`` have room for.
        card_price: dollars an hour of a card.
        rehearse: whether the steps are done on fake tensors.

    Raises:
        UserError, AskError, BudgetError: as the stages ``questions`` and ``samples`` do.
    """
    context = Context.open(config, runs)
    terms = Terms(parse_card(card), hours, rate, megabits, servers or _servers(context.config), card_price)
    with context.workspace.locked():
        plan_cascade(context, pilot)
        shape, work = shape_of(context.config.train.base), work_of(context)
        work = work._replace(questions=questions or work.questions)
        disk = next(folder for folder in context.workspace.ledger.absolute().parents if folder.exists())
        terms = terms._replace(free_bytes=shutil.disk_usage(disk).free)
        fit_tables.show(context.config, shape, work, terms, context.progress.console)
        if rehearse:
            _rehearse(context, shape, work)


def _servers(config: Config) -> int:
    """How many servers the nodes of a run's cluster have room for; one without a cluster.

    Raises:
        ClusterError: the nodes cannot be used.
    """
    return 1 if config.cluster is None else len(nodes_of(config.cluster).slots(config.serve.tensor_parallel))


def plan_cascade(context: Context, pilot: int) -> None:
    """Print what the cascade will ask, take and cost; once it is done, also what it did."""
    flow.run(context, ("questions",))
    questions = records.read(context.input("questions") / "train.jsonl", Question)
    rates = assume(context.config, questions)
    if pilot:
        drawn = rng("pilot", context.config.seed).sample(questions, min(pilot, len(questions)))
        with context.progress.stage("pilot"):
            rates |= measure(context, sorted(drawn, key=lambda question: question.id), rates)
    problems = len({question.problem_id for question in questions})
    held_out, held_out_problems, needed_by = len(samples.held_out_questions(context)), 0, "patience needs"
    if context.config.final == "all":  # all of them climb, and what patience has asked is not paid for again
        validation = records.read(context.input("questions") / "validation.jsonl", Question)
        held_out, needed_by = len(validation), "the final weights learn from"
        held_out_problems = len({question.problem_id for question in validation})
    rows = forecast(context.config, len(questions) + held_out, problems + held_out_problems, rates)
    console = context.progress.console
    also = f", and {held_out:,} validation questions, whose chains {needed_by}" if held_out else ""
    console.print(f"\n{len(questions):,} training questions about {problems:,} problems{also}\n", highlight=False)
    cost_tables.show(rows, context.config, console)
    cost_tables.sources(rates, console)
    if context.config.final == "all":
        say(console, f"\n{_final_hours(context, 1 + held_out / max(1, len(questions)))}")
    samples_are_done = _samples_are_done(context)
    if not samples_are_done:
        missing_keys = flow.missing_keys(context.config, "variants") | flow.missing_keys(context.config, "samples")
        for variable, model in missing_keys.items():
            say(console, f"\n{variable} is not set in this environment; the run will need it for model {model!r}.")
    # The ledger keeps no account of weights in this process, so there is nothing to compare.
    with_account = [row for row in rows if context.config.models[row.model].engine != "local"]
    if samples_are_done and with_account:
        cost_tables.compare(with_account, _accounts(context), console)


def _final_hours(context: Context, growth: float) -> str:
    """What training the final weights takes beside the chosen ones, whose data grow by a factor ``growth``; in hours
    once the chosen ones are made."""
    members, names = len(context.config.member), final_members(context)
    how_many = f"{len(names)} of {members} members" if len(names) < members else f"up to {members} members"
    text = (
        f"final = 'all': {how_many} are trained once more, on {growth:.2f} times the data, then merged, quantised and "
        "asked again."
    )
    places = [place for place in artifacts(context.chosen) if place.stage in ONCE_MORE and not place.context.is_final]
    seconds = 0.0
    for place in places:
        if place.part in names:
            if (manifest := Artifact(place.folder, {}, {}).manifest()) is None:
                return text
            seconds += manifest["seconds"] * (growth if place.stage == "adapter" else 1)
    return f"{text} By what the chosen weights took, that is about {duration(seconds)} here."


def measure(context: Context, drawn: Sequence[Question], assumed: Mapping[str, Rates]) -> dict[str, Rates]:
    """Rates by rung, measured by asking some questions; rungs that none of them reached are left out."""
    steps = [step for step in Cascade(context).climb(drawn) if step.reached and step.rung.kind == "ask"]
    medians = {(account.rung, account.model): account.percentile(0.5) for account in _accounts(context)}
    return {
        step.rung.name: Rates(
            solved_share(len(step.solved), step.reached),
            {
                model: _model_rates(
                    usage, step.asked, assumed[step.rung.name].models[model], medians.get((step.rung.name, model))
                )
                for model, usage in step.usage.items()
            },
            f"pilot of {step.reached}",
        )
        for step in steps
    }


def _model_rates(usage: Usage, questions: int, assumed: ModelRates, median: float | None) -> ModelRates:
    """One model's rates as measured by a pilot. ``median`` is of the seconds a call in the ledger, which has none for
    weights in this process; there the pilot's wall time a call is taken."""
    calls = ONE.times(usage.calls / questions)
    if not usage.calls:
        return assumed
    seconds = median if median is not None else usage.seconds / usage.calls
    return ModelRates(
        calls,
        ONE.times(usage.prompt_tokens / usage.calls),
        PILOT_FACTOR.times(usage.completion_tokens / usage.calls),
        PILOT_FACTOR.times(seconds),
    )


def _accounts(context: Context) -> list[Account]:
    if not context.workspace.ledger.exists():
        return []
    with Ledger(context.workspace.ledger, read_only=True) as ledger:
        return ledger.accounts(context.workspace.name)


def shape_of(base: str) -> Shape | None:
    """The shape of the student's base; None where it is neither on this machine nor a model of known shape. Nothing is
    downloaded."""
    folder = Path(base).expanduser()
    if base == models.BUNDLED or folder.is_dir():
        return model_shape.read(models.locate(base))
    cached = hubs.cached(base)
    return model_shape.qwen25(base) if cached is None else model_shape.read(cached)


def _rehearse(context: Context, shape: Shape | None, work: Workload) -> None:
    """Print what the steps take on fake tensors, a row as soon as it is done.

    Raises:
        UserError: the base is not known; ``[train]`` names what cannot be rehearsed.
    """
    train, console = context.config.train, context.progress.console
    if shape is None:
        raise UserError(f"--rehearse: {train.base} is not on this machine; download it, or name its folder")
    if train.backend != "trl" or train.sharding == "zero3":
        raise UserError("--rehearse: only backend = 'trl' with sharding = 'fsdp' or 'none' can be rehearsed")
    gptq.silence()
    models.require("peft", "llmcompressor", "compressed_tensors", *(("bitsandbytes",) if train.qlora else ()))
    from stepladder.rehearsal import rehearsal

    say(console, "\nRehearsed on fake tensors: GiB without libraries, in 16 bits; what is planned in brackets")
    student = rehearsal.Student(_architecture(train.base, shape), shape)
    for row in rehearsal.rehearse(context.config, student, work):
        kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in row.peak.most_common() if size > 0.05 * GIB)
        total, planned = row.peak.total() / GIB, row.planned / GIB
        say(console, f"  {row.step}: {total:.1f} ({planned:.1f}, {100 * row.deviation:+.0f} %): {kinds}")


def _architecture(base: str, shape: Shape) -> dict[str, Any]:
    """The base's config.json, or where it is not on this machine that of its shape."""
    from stepladder.rehearsal.depths import architecture

    folder = Path(base).expanduser()
    if base == models.BUNDLED or folder.is_dir():
        return read_json(models.locate(base) / "config.json")
    cached = hubs.cached(base)
    return architecture(shape) if cached is None else read_json(cached / "config.json")


def work_of(context: Context) -> Workload:
    """What the members will have to answer: the test questions, or without a test those of validation. The length of
    answers is the mean of the accepted chains, once there are some."""
    config = context.config
    split = "validation" if config.questions.test is None else "test"
    questions = records.read(context.input("questions") / f"{split}.jsonl", Question)
    prompts = [prompt_tokens(question, config.student_prompts) for question in questions] or [0.0]
    shared_tokens = sum(
        text_tokens(later.problem) for earlier, later in pairwise(questions) if earlier.problem_id == later.problem_id
    )
    answer = ANSWER_TOKENS.likely
    if _samples_are_done(context):
        accepted = records.read(context.input("samples") / "accepted.jsonl", Sample)
        chains = [text_tokens(sample.text) for sample in accepted]
        answer = fmean(chains) if chains else answer
    return Workload(
        questions=len(questions),
        votes=config.predict.votes,
        members=len(config.member),
        prompt=fmean(prompts),
        read=fmean(prompts) - shared_tokens / max(1, len(questions)),
        answer=min(answer, config.predict.max_tokens),
        length=round(max(prompts)) + config.predict.max_tokens,
        bits=config.quantise.bits,
        utilisation=config.serve.utilisation,
        kv_cache_gib=config.serve.kv_cache_gib,
        engine=config.predict.engine,
        dtype=config.serve.dtype if config.predict.engine == "vllm" else config.predict.dtype,
        quantiser=config.quantise.backend,
    )


def _samples_are_done(context: Context) -> bool:
    """Whether the samples are up to date. Without their folder the fingerprint is not computed, since it needs the
    models' weights, which may not be downloaded yet."""
    return context.input("samples").exists() and flow.stage("samples").artifact(context, None).state() == "done"
