"""What quantising costs, measured in pairs: merged and quantised model answer the same validation questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import models
from stepladder.answering.voting import conversation, correct, predict
from stepladder.config import Quantise
from stepladder.context import Context
from stepladder.documents import (
    AccuracyTest,
    Direction,
    Distance,
    FinalMeasurement,
    FlippedAnswer,
    Flips,
    Measurement,
    Paired,
    Verdict,
)
from stepladder.forecast.memory import weights_on_disk
from stepladder.quantising.margin import Outcomes, check_accuracy, decide, sentence
from stepladder.records import Example, Prediction, Question
from stepladder.stats import accuracy_interval, mcnemar
from stepladder.training.distance import compare, next_token_log_probabilities, rows_of
from stepladder.training.sequences import TokenRow

MAX_EXAMPLES = 3
"""Flipped questions of each direction that a verdict shows."""


MAX_KL_GROWTH = 2.0
"""How many times the chosen weights' KL divergence that of final weights may be: they are of one architecture, recipe
and form, so more says that something else went wrong than noise."""
NO_KL_SHARE = 0.1
"""Share of ``[quantise] max_kl`` below which the KL divergence is no matter, however small the chosen weights' is."""


class Reference(NamedTuple):
    """The merged model, with which every attempt at quantising is compared."""

    weights: Path
    questions: list[Question]
    answers: list[Prediction]
    conversations: list[Example]
    """Its readable answers to validation questions; all of them if none is readable."""
    next_tokens: Any
    """Its next-token distributions on ``conversations`` (training/distance.py); None where none fits."""


def reference(context: Context, member: str, merged: Path, questions: list[Question]) -> Reference:
    """Ask the merged model, once for all attempts."""
    answers = predict(context, member, merged, questions, "validation, merged")
    pairs = zip(questions, answers, strict=True)
    conversations = [conversation(context, question, answer.texts[0], "merged") for question, answer in pairs]
    readable = [chat for chat, answer in zip(conversations, answers, strict=True) if answer.votes[0] is not None]
    chosen = readable or conversations
    rows = rows_of(models.load_tokenizer(merged), chosen, context.config.train.max_length)
    return Reference(merged, questions, answers, chosen, _next_tokens(context, merged, rows))


def distance(context: Context, before: Reference, folder: Path) -> Distance | None:
    """How far a quantised form is from the merged weights, on the answers of the latter; None where none fits into
    ``max_length``."""
    rows = rows_of(models.load_tokenizer(folder), before.conversations, context.config.train.max_length)
    after = _next_tokens(context, folder, rows)
    return None if after is None else compare(before.next_tokens, after)


def _next_tokens(context: Context, folder: Path, rows: Sequence[TokenRow]) -> Any:
    """A model folder's next-token distributions on ``rows``, in the number format it answers in; None without rows."""
    return next_token_log_probabilities(folder, rows, context.config.predict.dtype) if rows else None


def measure(context: Context, member: str, before: Reference, folder: Path, rounding: Distance | None) -> Measurement:
    """Measure one attempt against the merged model, and list the limits of ``[quantise]`` that it exceeds.

    Args:
        context: the run.
        member: name of the member.
        before: the merged model.
        folder: of the quantised weights.
        rounding: how far plain rounding into the same form is from the merged weights; None where that is no limit.
    """
    settings, questions = context.config.quantise, before.questions
    bits = f"{settings.bits}-bit"
    answers = predict(context, member, folder, questions, f"validation, {bits}")
    right, right_after = correct(questions, before.answers), correct(questions, answers)
    problems, n = [question.problem_id for question in questions], len(questions)
    flips = mcnemar(right, right_after)
    tokenizer = models.load_tokenizer(folder)
    divergence = distance(context, before, folder)
    loss = (sum(right) - sum(right_after)) / n
    unparsed = Paired(merged=unreadable(before.answers), quantised=unreadable(answers))
    rounding_kl = None if rounding is None else rounding.kl
    exceeded = limits_exceeded(settings, unparsed, divergence, rounding_kl)
    outcomes = Outcomes(tuple(problems), tuple(right), tuple(right_after))
    if exceeded:  # it is refused anyway, whatever more answers would say
        accuracy = decide(outcomes, settings.max_loss)
    else:
        accuracy = check_accuracy(
            outcomes, questions, settings.max_loss, settings.max_orders, context.config.seed,
            lambda more: _outcomes(context, member, before.weights, folder, more),
        )  # fmt: skip
    exceeded += accuracy_exceeded(settings, accuracy)
    return Measurement(
        merged=sum(right) / n,
        quantised=sum(right_after) / n,
        intervals=Paired(
            merged=accuracy_interval(right, problems, context.config.seed),
            quantised=accuracy_interval(right_after, problems, context.config.seed),
        ),
        loss=loss,
        n=n,
        flips=Flips(
            right_to_wrong=flips.lost,
            wrong_to_right=flips.won,
            p=flips.p,
            examples=flipped_answers(questions, before.answers, answers),
        ),
        unparsed=unparsed,
        accuracy=accuracy,
        tokens=Paired(merged=_mean_tokens(tokenizer, before.answers), quantised=_mean_tokens(tokenizer, answers)),
        distance=divergence,
        rounding_kl=rounding_kl,
        bytes=Paired(merged=weights_on_disk(before.weights), quantised=weights_on_disk(folder)),
        why=tuple(exceeded),
    )


def measure_final(
    context: Context, member: str, before: Reference, folder: Path, rounding: Distance | None, chosen: Verdict
) -> FinalMeasurement:
    """Measure final weights in the form that was chosen against their merged ones, and list the limits that are
    exceeded.

    Validation accuracy says nothing about weights that learned its labels, so they must be as close to their merged
    weights as the ``chosen`` ones are to theirs, within :data:`MAX_KL_GROWTH`, and as readable, within ``[quantise]
    max_unparsed``. Other arguments as for :func:`measure`.
    """
    settings = context.config.quantise
    answers = predict(context, member, folder, before.questions, f"validation, {chosen.form.bits}-bit")
    tokenizer, divergence = models.load_tokenizer(folder), distance(context, before, folder)
    unparsed = Paired(merged=unreadable(before.answers), quantised=unreadable(answers))
    rounding_kl = None if rounding is None else rounding.kl
    exceeded = limits_exceeded(settings, unparsed, divergence, rounding_kl)
    chosen_kl, chosen_unparsed = None if chosen.distance is None else chosen.distance.kl, chosen.unparsed.quantised
    if (growth := unparsed.quantised - chosen_unparsed) > settings.max_unparsed:
        exceeded.append(
            f"answers without a readable letter are {growth:.3f} more than the chosen weights', which is above "
            f"max_unparsed = {settings.max_unparsed}"
        )
    if divergence is not None and chosen_kl is not None and divergence.kl > final_kl_limit(chosen_kl, settings.max_kl):
        exceeded.append(
            f"KL divergence is {divergence.kl:.4f} nats a token, more than {MAX_KL_GROWTH:g} times the chosen weights' "
            f"{chosen_kl:.4f}"
        )
    return FinalMeasurement(
        n=len(before.questions),
        unparsed=unparsed,
        tokens=Paired(merged=_mean_tokens(tokenizer, before.answers), quantised=_mean_tokens(tokenizer, answers)),
        distance=divergence,
        rounding_kl=rounding_kl,
        bytes=Paired(merged=weights_on_disk(before.weights), quantised=weights_on_disk(folder)),
        chosen_unparsed=chosen_unparsed,
        chosen_kl=chosen_kl,
        why=tuple(exceeded),
    )


def final_kl_limit(chosen_kl: float, max_kl: float) -> float:
    """The largest KL divergence that final weights may have, nats a token.

    >>> final_kl_limit(0.05, 0.5), final_kl_limit(1e-6, 0.5)
    (0.1, 0.05)
    """
    return max(MAX_KL_GROWTH * chosen_kl, NO_KL_SHARE * max_kl)


def limits_exceeded(
    settings: Quantise, unparsed: Paired[float], divergence: Distance | None, rounding_kl: float | None
) -> list[str]:
    """The limits that need no labels, as far as they are exceeded, as sentences."""
    exceeded = []
    if (growth := unparsed.quantised - unparsed.merged) > settings.max_unparsed:
        exceeded.append(
            f"answers without a readable letter grew by {growth:.3f}, more than max_unparsed = {settings.max_unparsed}"
        )
    if divergence is not None and divergence.kl > settings.max_kl:
        exceeded.append(f"KL divergence is {divergence.kl:.3f} nats a token, more than max_kl = {settings.max_kl}")
    if divergence is not None and rounding_kl is not None and divergence.kl > rounding_kl:
        exceeded.append(
            f"KL divergence is {divergence.kl:.4f} nats a token where plain rounding costs {rounding_kl:.4f}, so the "
            "calibration did harm"
        )
    return exceeded


def accuracy_exceeded(settings: Quantise, accuracy: AccuracyTest) -> list[str]:
    """The loss of accuracy as a sentence, where ``[quantise]`` does not let it pass."""
    fails = accuracy.decision == "worse" or (accuracy.decision == "cannot tell" and settings.undecided == "fail")
    return [sentence(accuracy, settings.max_orders)] if fails else []


def _outcomes(context: Context, member: str, merged: Path, folder: Path, questions: list[Question]) -> Outcomes:
    """Answers of both models to questions in other orders."""
    settings = context.config.quantise
    context.progress.say(
        f"quantised/{member}: too few answers to tell whether max_loss = {settings.max_loss} is kept; "
        f"{len(questions)} more, with the options in other orders"
    )
    before, after = (
        correct(questions, predict(context, member, weights, questions, f"validation, other orders, {name}"))
        for name, weights in (("merged", merged), (f"{settings.bits}-bit", folder))
    )
    return Outcomes(tuple(question.problem_id for question in questions), tuple(before), tuple(after))


def flipped_answers(
    questions: Sequence[Question], before: Sequence[Prediction], after: Sequence[Prediction]
) -> tuple[FlippedAnswer, ...]:
    """The first flipped questions of each direction, with the answers before and after."""
    flipped: dict[Direction, list[FlippedAnswer]] = {"right_to_wrong": [], "wrong_to_right": []}
    for question, merged, quantised in zip(questions, before, after, strict=True):
        was_right, is_right = merged.answer == question.answer, quantised.answer == question.answer
        if was_right != is_right:
            direction: Direction = "right_to_wrong" if was_right else "wrong_to_right"
            flipped[direction].append(
                FlippedAnswer(
                    question_id=question.id,
                    direction=direction,
                    before=merged.texts[0],
                    after=quantised.texts[0],
                )
            )
    return tuple(answer for answers in flipped.values() for answer in answers[:MAX_EXAMPLES])


def unreadable(answers: Sequence[Prediction]) -> float:
    """Share of the votes without a readable letter."""
    return sum(vote is None for answer in answers for vote in answer.votes) / sum(len(a.votes) for a in answers)


def _mean_tokens(tokenizer: Any, answers: Sequence[Prediction]) -> float:
    """Mean length of an answer, tokens."""
    texts = [text for answer in answers for text in answer.texts]
    return float(sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) / len(texts))
