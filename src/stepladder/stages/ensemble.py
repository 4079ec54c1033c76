"""ensemble: one answer from the quantised members' answers. The rule is chosen and fitted on validation only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    names = [member.name for member in config.member]
    inputs = {f"predictions {name}": context.digest_of("predictions", name) for name in names}
    inputs["questions"] = context.digest_of("questions")
    inputs |= {"leader": leader(context), "members": digest(eligible(context))}
    return Artifact(context.workspace.path("ensemble"), {"ensemble": settings(config.ensemble)}, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    config, allowed = context.config, eligible(context)
    questions = {s: records.read(context.input("questions") / f"{s}.jsonl", Question) for s in splits(config)}
    answers = {
        split: {
            member.name: records.read(
                context.input("predictions", member.name) / f"quantised.{split}.jsonl", Prediction
            )
            for member in config.member
            if member.name in allowed
        }
        for split in questions
    }
    ballots = {split: ballot_of(given) for split, given in answers.items()}
    validation = questions["validation"]
    right = np.array([LETTERS.index(str(question.answer)) for question in validation])
    found = None
    if len({question.problem_id for question in validation}) > 1:
        problems = [question.problem_id for question in validation]
        found = select(ballots["validation"], right, problems, config.seed)
    auto = "single" if found is None else found.choice
    rule = auto if config.ensemble.rule == "auto" or len(allowed) == 1 else config.ensemble.rule
    apply = RULES[rule](ballots["validation"], right)
    for split, given in answers.items():
        combined = combine(given, apply(ballots[split]))
        write_atomic(folder / f"{split}.jsonl", records.lines(combined))
        write_atomic(folder / f"answers.{split}.jsonl", submission(questions[split], combined))
    refused = [member.name for member in config.member if member.name not in allowed]
    if refused:
        context.progress.say(f"without {', '.join(refused)}: the variants did not help on validation")
    EnsembleChoice(
        rule=rule,
        leader=leader(context),
        members=tuple(allowed),
        validation=None if found is None else found.document(),
    ).write(folder)


def combine(given: Mapping[str, Sequence[Prediction]], letters: Letters) -> list[Prediction]:
    """One prediction a question from the members' predictions, all in the same order, and the letters chosen."""
    combined = []
    for letter, *rows in zip(letters, *given.values(), strict=True):
        votes = tuple(row.answer for row in rows)
        answer = None if letter < 0 else LETTERS[letter]
        texts = tuple(text for row in rows for text in row.texts[:1])
        combined.append(
            Prediction(question_id=rows[0].question_id, member="ensemble", votes=votes, answer=answer, texts=texts)
        )
    return combined
