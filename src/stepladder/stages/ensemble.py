"""ensemble: one answer from the quantised members' answers. The rule is chosen and fitted on validation only, on the
answers of the chosen weights; final weights are joined by it as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from stepladder import records
from stepladder.config import settings
from stepladder.context import Context
from stepladder.documents import EnsembleChoice
from stepladder.ensembling.rules import RULES, Letters, ballot_of
from stepladder.ensembling.selection import select
from stepladder.mcq.answerfile import submission
from stepladder.records import LETTERS, Prediction, Question
from stepladder.stages.predictions import eligible, leader, splits
from stepladder.workspace import Artifact, digest, write_atomic


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    if context.is_final:
        names = list(_choice(context).answering)
        inputs = {f"predictions {name}": context.digest_of("predictions", name) for name in names}
        inputs["chosen"] = context.chosen.digest_of("ensemble")
        inputs |= {f"chosen {name}": context.chosen.digest_of("predictions", name) for name in names}
        return Artifact(context.input("ensemble"), {}, inputs | {"questions": context.digest_of("questions")})
    names = [member.name for member in config.member]
    inputs = {f"predictions {name}": context.digest_of("predictions", name) for name in names}
    inputs["questions"] = context.digest_of("questions")
    inputs |= {"leader": leader(context), "members": digest(eligible(context))}
    return Artifact(context.input("ensemble"), {"ensemble": settings(config.ensemble)}, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    if context.is_final:
        _build_final(context, folder)
        return
    config, eligible_members = context.config, eligible(context)
    questions = {s: records.read(context.input("questions") / f"{s}.jsonl", Question) for s in splits(config)}
    answers = {split: _answers(context, eligible_members, split) for split in questions}
    ballots = {split: ballot_of(by_member) for split, by_member in answers.items()}
    validation = questions["validation"]
    right = _right(validation)
    selection = None
    if len({question.problem_id for question in validation}) > 1:
        problems = [question.problem_id for question in validation]
        selection = select(ballots["validation"], right, problems, config.seed)
    auto = "single" if selection is None else selection.choice
    rule = auto if config.ensemble.rule == "auto" or len(eligible_members) == 1 else config.ensemble.rule
    fitted = RULES[rule](ballots["validation"], right)
    for split, by_member in answers.items():
        combined = combine(by_member, fitted(ballots[split]), leader(context))
        write_atomic(folder / f"{split}.jsonl", records.lines(combined))
        write_atomic(folder / f"answers.{split}.jsonl", submission(questions[split], combined))
    excluded = [member.name for member in config.member if member.name not in eligible_members]
    if excluded:
        context.progress.say(f"without {', '.join(excluded)}: the variants did not help on validation")
    EnsembleChoice(
        rule=rule,
        leader=leader(context),
        members=tuple(eligible_members),
        validation=None if selection is None else selection.document(),
    ).write(folder)


def _build_final(context: Context, folder: Path) -> None:
    """The chosen rule, fitted on the chosen weights' validation answers, joins the final weights' answers."""
    choice = _choice(context)
    questions = {s: records.read(context.input("questions") / f"{s}.jsonl", Question) for s in splits(context.config)}
    fitted = RULES[choice.rule](
        ballot_of(_answers(context.chosen, choice.answering, "validation")), _right(questions["validation"])
    )
    for split, asked in questions.items():
        by_member = _answers(context, choice.answering, split)
        combined = combine(by_member, fitted(ballot_of(by_member)), choice.leader)
        write_atomic(folder / f"{split}.jsonl", records.lines(combined))
        if split == "test":
            write_atomic(folder / f"answers.{split}.jsonl", submission(asked, combined))


def _choice(context: Context) -> EnsembleChoice:
    context.chosen.digest_of("ensemble")
    return EnsembleChoice.read(context.chosen.input("ensemble"))


def _answers(context: Context, names: Iterable[str], split: str) -> dict[str, list[Prediction]]:
    """The quantised members' answers to the questions of a split."""
    return {
        name: records.read(context.input("predictions", name) / f"quantised.{split}.jsonl", Prediction)
        for name in names
    }


def _right(questions: Sequence[Question]) -> Letters:
    """The position of each question's label among the letters."""
    return np.array([LETTERS.index(str(question.answer)) for question in questions])


def combine(predictions: Mapping[str, Sequence[Prediction]], letters: Letters, leader: str) -> list[Prediction]:
    """One prediction a question from the members' predictions, all in the same order, and the letters chosen; where
    none was chosen, the leader's letter is forced."""
    combined = []
    for letter, own, *rows in zip(letters, predictions[leader], *predictions.values(), strict=True):
        answer = None if letter < 0 else LETTERS[letter]
        combined.append(
            Prediction(
                question_id=own.question_id,
                member="ensemble",
                votes=tuple(row.answer for row in rows),
                answer=answer,
                forced=own.letter if answer is None else None,
                texts=tuple(text for row in rows for text in row.texts[:1]),
            )
        )
    return combined
