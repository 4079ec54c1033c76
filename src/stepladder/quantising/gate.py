"""What quantising cost, measured in pairs: the same validation questions to the merged and the quantised model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import models
from stepladder.answering.voting import conversation, correct, predict
from stepladder.config import Quantise
from stepladder.context import Context
from stepladder.records import Example, Prediction, Question
from stepladder.stats import accuracy_interval, mcnemar
from stepladder.training.distance import Distance, compare, next_token_log_probabilities, rows_of
from stepladder.training.sequences import TokenRow

EXAMPLES = 3
"""Flipped questions of either direction that a verdict shows."""


class Reference(NamedTuple):
    """The merged model, which every attempt at quantising is held against."""

    weights: Path
    questions: list[Question]
    answers: list[Prediction]
    own: list[Example]
    """Its readable answers to validation questions, as conversations."""
    next_tokens: Any
    """Its distributions on them (training/distance.py)."""


def reference(context: Context, member: str, merged: Path, questions: list[Question]) -> Reference:
    """Ask the merged model, once for all attempts."""
    answers = predict(context, member, merged, questions, "validation, merged")
    pairs = zip(questions, answers, strict=True)
    own = [conversation(context, question, answer.texts[0], "merged") for question, answer in pairs]
    readable = [chat for chat, answer in zip(own, answers, strict=True) if answer.votes[0] is not None]
    chosen = readable or own
    rows = rows_of(models.load_tokenizer(merged), chosen, context.config.train.max_length)
    return Reference(merged, questions, answers, chosen, _next_tokens(context, merged, rows))


def distance(context: Context, before: Reference, folder: Path) -> Distance | None:
    """How far a quantised form is from the merged weights, on the answers of the latter; None where there are none."""
    rows = rows_of(models.load_tokenizer(folder), before.own, context.config.train.max_length)
    found = _next_tokens(context, folder, rows)
    return None if found is None else compare(before.next_tokens, found)


def _next_tokens(context: Context, folder: Path, rows: Sequence[TokenRow]) -> Any:
    """What a model folder gives on ``rows``, computed as it answers; None where there are none."""
    return next_token_log_probabilities(models.load(folder, context.config.predict.dtype), rows) if rows else None


def measure(
    context: Context, member: str, before: Reference, folder: Path, rounding: Distance | None
) -> dict[str, Any]:
    """The verdict on one attempt; ``why`` lists what speaks against it, nothing where it passes.

    Args:
        context: the run.
        member: whose weights they are.
        before: the merged model.
        folder: the attempt.
        rounding: how far plain rounding into the same form is from the merged weights, where that is worth knowing.
    """
    settings, questions = context.config.quantise, before.questions
    bits = f"{settings.bits}-bit"
    answers = predict(context, member, folder, questions, f"validation, {bits}")
    right, right_after = correct(questions, before.answers), correct(questions, answers)
    problems, n = [question.problem_id for question in questions], len(questions)
    flips = mcnemar(right, right_after)
    tokenizer = models.load_tokenizer(folder)
    apart = distance(context, before, folder)
    measured: dict[str, Any] = {
        "merged": sum(right) / n,
        "quantised": sum(right_after) / n,
        "intervals": {
            "merged": accuracy_interval(right, problems, context.config.seed),
            "quantised": accuracy_interval(right_after, problems, context.config.seed),
        },
        "loss": (sum(right) - sum(right_after)) / n,
        "n": n,
        "flips": {
            "right_to_wrong": flips.lost,
            "wrong_to_right": flips.won,
            "p": flips.p,
            "examples": _examples(questions, before.answers, answers),
        },
        "unparsed": {"merged": _unparsed(before.answers), "quantised": _unparsed(answers)},
        "tokens": {"merged": _tokens(tokenizer, before.answers), "quantised": _tokens(tokenizer, answers)},
        "distance": None if apart is None else apart._asdict(),
        "rounding_kl": None if rounding is None else rounding.kl,
        "bytes": {"merged": _weights(before.weights), "quantised": _weights(folder)},
    }
    return measured | {"why": against(measured, settings)}


def against(measured: dict[str, Any], settings: Quantise) -> list[str]:
    """What of a measurement breaks the gate, in words."""
    grown = measured["unparsed"]["quantised"] - measured["unparsed"]["merged"]
    kl = 0.0 if measured["distance"] is None else measured["distance"]["kl"]
    rounding = float("inf") if measured["rounding_kl"] is None else measured["rounding_kl"]
    right, after = (round(measured[name] * measured["n"]) for name in ("merged", "quantised"))
    checks = (
        (
            measured["loss"] > settings.max_loss,
            f"validation accuracy fell by {measured['loss']:.3f} (from {right} to {after} of {measured['n']}), more "
            f"than max_loss = {settings.max_loss}",
        ),
        (
            grown > settings.max_unparsed,
            f"answers without a readable letter grew by {grown:.3f}, more than max_unparsed = {settings.max_unparsed}",
        ),
        (kl > settings.max_kl, f"KL divergence is {kl:.3f} nats a token, more than max_kl = {settings.max_kl}"),
        (
            kl > rounding,
            f"KL divergence is {kl:.4f} nats a token where plain rounding costs {rounding:.4f}, so the calibration did "
            "harm",
        ),
    )
    return [said for broken, said in checks if broken]


def _examples(
    questions: Sequence[Question], before: Sequence[Prediction], after: Sequence[Prediction]
) -> list[dict[str, Any]]:
    """The first flipped questions of either direction, with what was said before and after."""
    found: dict[str, list[dict[str, Any]]] = {"right_to_wrong": [], "wrong_to_right": []}
    for question, old, new in zip(questions, before, after, strict=True):
        was_right, is_right = old.answer == question.answer, new.answer == question.answer
        if was_right != is_right:
            direction = "right_to_wrong" if was_right else "wrong_to_right"
            texts = {"before": old.texts[0], "after": new.texts[0]}
            found[direction].append({"question_id": question.id, "direction": direction, **texts})
    return [row for rows in found.values() for row in rows[:EXAMPLES]]


def _unparsed(answers: Sequence[Prediction]) -> float:
    return sum(vote is None for answer in answers for vote in answer.votes) / sum(len(a.votes) for a in answers)


def _tokens(tokenizer: Any, answers: Sequence[Prediction]) -> float:
    """Mean length of an answer."""
    texts = [text for answer in answers for text in answer.texts]
    return float(sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) / len(texts))


def _weights(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
