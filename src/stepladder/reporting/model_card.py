"""The model card of a finished model: what it is, what it learned from, what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from stepladder import models
from stepladder.config import Config, Member
from stepladder.documents import FinalVerdict, TrainsetCard, Verdict
from stepladder.models import BUNDLED
from stepladder.reporting.data_card import code, student_name, yaml_head

MAX_HEAD_CHARACTERS = 20_000
"""Of a base's card that are read for its licence."""
BUNDLED_LICENCE = "apache-2.0"
"""Of SmolLM2-135M-Instruct."""


def markdown(config: Config, mix: Member, base: Path, card: TrainsetCard, verdict: Verdict | FinalVerdict) -> str:
    """A README in the form of the Hugging Face hub: a YAML head, then sections.

    Args:
        config: the run.
        mix: the member.
        base: folder of the base's weights, whose README may name a licence.
        card: the data card of the member's trainset.
        verdict: what quantising was measured to cost.
    """
    from huggingface_hub import ModelCardData

    student = student_name(config, mix)
    name, licence = base_name(student), licence_of(student, base)
    form, dtype = verdict.form, verdict.dtype
    lora = ["lora"] if student == config.train.base else []
    head = [
        *yaml_head(
            ModelCardData(
                language=[config.language],
                library_name="transformers",
                pipeline_tag="text-generation",
                base_model=name,
                base_model_relation="quantized",
                license=licence,
                tags=["multiple-choice", "chain-of-thought", *lora, "gptq", "stepladder"],
            )
        ),
        f"# {config.name}, member {mix.name}{', final weights' if isinstance(verdict, FinalVerdict) else ''}",
        "",
        f"{code(name)}, {_taught(mix)} to answer multiple-choice questions on closed-world problems step by step, in "
        f"{form.bits} bits ({verdict.bytes.quantised / 1e6:,.0f} MB of weights). The last line of an answer "
        "carries the letter.",
        "",
        "```",
        "vllm serve .",
        "```",
    ]
    recipe = [
        "",
        "## Data and recipe",
        f"{card.examples:,} conversations on {card.questions:,} questions about {card.problems:,} problems, "
        f"{card.tokens:,} tokens; the folder of the trainset has their card. " + _recipe(config, mix, dtype.trained),
        "",
        f"Quantised by {config.quantise.method.upper()} ({config.quantise.backend}): {form.bits} bits, groups of "
        f"{form.group_size}, calibrated on {min(form.samples, card.examples):,} of its own conversations"
        + "".join(f" and {general.samples:,} rows of general text" for general in config.quantise.general)
        + (f"; repaired by {form.repair!r}." if form.repair else "."),
    ]
    measured = (
        _measured_of_final(verdict) if isinstance(verdict, FinalVerdict) else _measured(verdict, config.predict.engine)
    )
    return "\n".join([*head, *recipe, *measured, *_limits(config, licence), ""])


def _taught(mix: Member) -> str:
    """How a member learned."""
    if mix.path is None:
        return "taught by LoRA"
    return f"{'with an adapter that was ' if models.is_adapter(mix.path) else ''}trained elsewhere and is used"


def _recipe(config: Config, mix: Member, trained_in: str | None) -> str:
    """How a member was trained."""
    if mix.path is not None:
        return "It was trained elsewhere; these conversations are what it was calibrated on."
    train = config.train
    return (
        f"LoRA on all linear layers: rank {train.lora_rank}, alpha {train.lora_alpha}, {train.epochs:g} epochs, "
        f"learning rate {train.learning_rate:g} ({train.schedule}), {train.batch_size * train.gradient_accumulation} "
        f"sequences a step, at most {train.max_length:,} tokens, seed {mix.seed}; trained and merged with "
        f"{train.backend}" + (f", the base in {trained_in}." if trained_in else ".")
    )


def base_name(base: str) -> str:
    """The name of a base: a hub's id without its revision, or the name of a folder."""
    if base == BUNDLED:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return PurePath(base).name if Path(base).is_dir() else base.removeprefix("modelscope:").partition("@")[0]


def _measured(verdict: Verdict, engine: str) -> Iterable[str]:
    flips, distance = verdict.flips, verdict.distance
    yield from (
        "",
        "## Measured",
        f"On {verdict.n} validation questions, greedy unless the run says otherwise, computed in "
        f"{verdict.dtype.measured}:"
        if engine == "local"
        else f"On {verdict.n} validation questions, greedy unless the run says otherwise, by vLLM:",
        "",
        "| | Accuracy, % | 95 % interval | Unreadable, % | Tokens an answer |",
        "|---|---:|---:|---:|---:|",
    )
    intervals, unparsed, tokens = verdict.intervals, verdict.unparsed, verdict.tokens
    for row in (
        ("before quantising", verdict.merged, intervals.merged, unparsed.merged, tokens.merged),
        ("this model", verdict.quantised, intervals.quantised, unparsed.quantised, tokens.quantised),
    ):
        title, accuracy, interval, unreadable, length = row
        yield (
            f"| {title} | {100 * accuracy:.1f} | {100 * interval.low:.1f} to {100 * interval.high:.1f} | "
            f"{100 * unreadable:.1f} | {length:.0f} |"
        )
    yield ""
    yield (
        f"Quantising turned {flips.right_to_wrong} right answers wrong and {flips.wrong_to_right} wrong ones "
        f"right (exact McNemar p = {flips.p:.3g})."
        + (f" Mean KL divergence of its next tokens: {distance.kl:.4f} nats." if distance else "")
    )
    if (test := verdict.accuracy) is not None:
        yield (
            f"Over {test.answers} answers, with options in one or more orders, it lost {test.lost} and won {test.won}; "
            f"a loss of more than {100 * test.largest_loss:.1f} points is excluded (one-sided 2.5 %, Tango 1998)."
        )


def _measured_of_final(verdict: FinalVerdict) -> Iterable[str]:
    distance = verdict.distance
    yield from (
        "",
        "## Measured",
        "These weights learned from the labels of training and validation together, by a recipe that was chosen on "
        "validation with other weights, trained without those labels. Accuracies on validation belong to the chosen "
        "weights; these have none but what the run's report gives for its test as final.",
        "",
        f"Answers to {verdict.n} validation questions without a readable letter: "
        f"{100 * verdict.unparsed.quantised:.1f} % (before quantising {100 * verdict.unparsed.merged:.1f} %, chosen "
        f"weights {100 * verdict.chosen_unparsed:.1f} %).",
    )
    if distance is not None:
        chosen = "" if verdict.chosen_kl is None else f" (chosen weights {verdict.chosen_kl:.4f})"
        yield f"Mean KL divergence of its next tokens by quantising: {distance.kl:.4f} nats{chosen}."


def _limits(config: Config, licence: str | None) -> Iterable[str]:
    yield from (
        "",
        "## Limits",
        "It has learned one kind of question in one form of prompt, and knows little else. It takes what a problem "
        "does not say as false. Its steps may be wrong where its answer is right. Validation questions have been used "
        "to choose between models, so figures on new questions will be a little lower.",
        "",
        "## Licence",
        f"The base's: {licence}." if licence else "The base's, which its folder does not name.",
        f"Made by Stepladder, run {code(config.name)}.",
    )


def licence_of(name: str, base: Path) -> str | None:
    """The licence in the metadata of a base's model card, by its name and folder; None where there is none."""
    if name == BUNDLED:
        return BUNDLED_LICENCE
    card = base / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(MAX_HEAD_CHARACTERS)
    match = re.match(r"---\n(?:.*\n)*?license:[ \t]*+([\w.-]++)", head)
    return match[1] if match else None
