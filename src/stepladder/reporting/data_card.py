"""The data card of a trainset: what is in it, where it came from and what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING

from stepladder import models
from stepladder.config import Config, Member
from stepladder.documents import TrainsetCard
from stepladder.mcq.cleaning import FLAWS

if TYPE_CHECKING:
    from huggingface_hub import CardData

MAX_TWINS_LISTED = 20
"""card.json has all."""

LEFT_OUT = {
    "leaked": "because their problem is, wholly or nearly, one of validation or test",
    "other_language": "because the chain is not in the language of its question",
    "long_chain": "because the chain is longer than `max_chain` tokens",
    "same_chain": "because other chains for the question say as much, or there are enough",
    "duplicates": "because the same conversation was there already",
    "left_out": "because they are longer than `max_length` tokens",
}
REASONS = {**LEFT_OUT, **FLAWS}
"""Why chains are left out, by the card's fields and by flaw."""


def markdown(config: Config, mix: Member, card: TrainsetCard) -> str:
    """A README in the form of the Hugging Face hub: a YAML head, then sections."""
    from huggingface_hub import DatasetCardData

    length, is_final = card.length, "validation" in card.labels
    head = [
        *yaml_head(
            DatasetCardData(
                language=[config.language],
                task_categories=["question-answering"],
                tags=["multiple-choice", "chain-of-thought", "stepladder"],
                size_categories=[_size(card.examples)],
            )
        ),
        f"# Training chains of {'the final weights of ' if is_final else ''}member {mix.name}, run {config.name}",
        "",
        f"{card.examples:,} conversations on {card.questions:,} questions about {card.problems:,} problems, "
        f"{card.tokens:,} tokens of the student {code(PurePath(student_name(config, mix)).name)}"
        + f"; half have up to {length.median:.0f}, 95 % up to {length.p95:.0f}"
        + '. A line of `train.jsonl` is `{"messages": [...], "question_id", "teacher"}`.',
        "",
        "Every chain ended in the right answer: that of its label, under each order of the options it was asked in, or "
        "what its rung's rule says instead.",
        *(
            [
                "",
                "Labels of training and validation: weights that learned from these have no figure on validation.",
            ]
            if is_final
            else []
        ),
    ]
    mixed = [
        "",
        "## The mix",
        *(["Letters only, without the chains that lead to them."] if mix.learns == "letters" else []),
        f"Teachers: {', '.join(map(code, mix.teachers)) or 'all rungs and models'}. Share of the problems: "
        f"{100 * mix.share:g} %, drawn with seed {mix.seed}. Chains a question: {mix.chains or 'all'}. Proved "
        f"variants: {'yes' if mix.variants else 'no'}. Orders of options a chain: {mix.orders}"
        f"{f' ({card.in_one_order:,} chains in their own only)' if mix.orders > 1 else ''}. Answer letters balanced: "
        f"{'yes' if mix.balance else 'no'}.",
    ]
    counts = {key: getattr(card, key) for key in LEFT_OUT} | dict(card.flawed)
    left = [f"- {counts[key]:,} {why}" for key, why in REASONS.items() if counts.get(key)]
    cleaned = [f"- {form}: {count:,}" for form, count in card.cleaned.items()]
    twins = [
        f"- {code(twin.problem)} and {code(twin.of)}: similarity {twin.similarity:.2f}"
        for twin in card.twins[:MAX_TWINS_LISTED]
    ]
    more = len(card.twins) - len(twins)
    return "\n".join(
        [
            *head,
            *mixed,
            *_table("Teacher", card.teachers),
            *_table("Source", card.sources),
            *_table("Right letter", card.letters),
            "",
            "## Left out",
            *(left or ["Nothing."]),
            "",
            "## Cleaned",
            "Debris that was removed from chains, by form (stepladder.mcq.cleaning):" if cleaned else "Nothing.",
            *cleaned,
            "",
            "## Contamination",
            f"Compared with every problem of {'' if is_final else 'validation and '}test, word for word and by "
            "weighted 4-grams (stepladder.mcq.overlap). "
            + (
                "Training problems found there, none of which is in this set:"
                if twins
                else "No training problem was found there."
            ),
            *twins,
            *([f"- and {more} more in card.json"] if more else []),
            "",
        ]
    )


def student_name(config: Config, mix: Member) -> str:
    """What a member's weights are made of: a finished model, or the base, with an adapter or before training."""
    return mix.path if mix.path is not None and not models.is_adapter(mix.path) else config.train.base


def yaml_head(data: CardData) -> list[str]:
    """The metadata of a card as the lines before its text."""
    return ["---", *data.to_yaml().strip().splitlines(), "---"]


def _table(title: str, counts: Mapping[str, int]) -> Iterable[str]:
    total = max(1, sum(counts.values()))
    rows = (f"| {cell(name)} | {count:,} | {100 * count / total:.1f} % |" for name, count in counts.items())
    return ["", f"| {title} | Conversations | Share |", "|---|---:|---:|", *rows]


def code(name: object) -> str:
    """A name as Markdown code."""
    return f"`{str(name).replace('`', '')}`"


def cell(name: str) -> str:
    """A text inside a Markdown table."""
    return " ".join(name.split()).replace("|", "\\|")


def _size(count: int) -> str:
    """The hub's size classes."""
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in limits if count < limit), "n>1M")
