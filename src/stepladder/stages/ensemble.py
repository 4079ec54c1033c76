"""ensemble: one answer from the quantised members' answers. The rule is chosen on validation only."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepladder import records
from stepladder.config import Config, settings
from stepladder.mcq.answer import majority
from stepladder.records import Prediction, Question
from stepladder.stages.answers import correct
from stepladder.stages.flow import Context, digest_of, members
from stepladder.stages.predictions import eligible, leader, splits
from stepladder.stats import mcnemar
from stepladder.workspace import Artifact, digest, write_atomic

RULES = ("single", "vote", "leader")
"""In order of simplicity: an earlier rule wins ties."""
SIGNIFICANT = 0.05
"""p-value below which a rule is better than the best member."""


def parts(config: Config) -> tuple[str | None, ...]:
    return (None,)


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {f"predictions {name}": digest_of(context, "predictions", name) for name in members(config)}
    inputs["questions"] = digest_of(context, "questions")
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
    validation = questions["validation"]
    best = leader(context)
    right = {rule: correct(validation, combine(rule, best, answers["validation"])) for rule in RULES}
    by_rule = {rule: sum(hits) / len(validation) for rule, hits in right.items()}
    auto = choose(right)
    rule = auto if config.ensemble.rule == "auto" or len(allowed) == 1 else config.ensemble.rule
    for split, given in answers.items():
        combined = combine(rule, best, given)
        write_atomic(folder / f"{split}.jsonl", records.lines(combined))
        write_atomic(folder / f"answers.{split}.jsonl", submission(questions[split], combined))
    choice = {"rule": rule, "leader": best, "members": allowed, "validation": by_rule}
    refused = [member.name for member in config.member if member.name not in allowed]
    if refused:
        context.progress.say(f"without {', '.join(refused)}: the variants did not help on validation")
    write_atomic(folder / "choice.json", json.dumps(choice, indent=1, ensure_ascii=False) + "\n")


def choose(right: Mapping[str, Sequence[bool]]) -> str:
    """The rule to trust, by whether each was right on each validation question: the best one, but only where it beats
    the best member by more than chance explains (exact McNemar). A question or two more on validation are luck, and
    an ensemble costs as many times the compute as it has members."""
    rule = max(RULES, key=lambda rule: sum(right[rule]))
    return rule if mcnemar(right["single"], right[rule]).p < SIGNIFICANT else "single"


def combine(rule: str, leader: str, given: dict[str, list[Prediction]]) -> list[Prediction]:
    """One prediction per question from the members' predictions, all in the same order."""
    names = list(given)
    combined = []
    for rows in zip(*given.values(), strict=True):
        votes = tuple(row.answer for row in rows)
        answer = decide(rule, names.index(leader), votes)
        texts = tuple(text for row in rows for text in row.texts[:1])
        combined.append(
            Prediction(question_id=rows[0].question_id, member="ensemble", votes=votes, answer=answer, texts=texts)
        )
    return combined


def decide(rule: str, leader: int, votes: Sequence[str | None]) -> str | None:
    """One question's answer by a rule, from one vote per member.

    ``single``: the leader's. ``vote``: the most frequent letter, ties to the leader's if it is among them.
    ``leader``: the other members' where they all agree, otherwise the leader's (the winning entry's rule).
    """
    best = votes[leader]
    others = [vote for at, vote in enumerate(votes) if at != leader]
    if rule == "single" or not others:
        return best
    if rule == "vote":
        # The leader's vote goes first, and the first of equally frequent letters wins.
        return majority((best, *others))
    agreed = others[0] if len(set(others)) == 1 else None
    return agreed or best or majority(tuple(others))


def submission(questions: list[Question], predictions: list[Prediction]) -> str:
    """The contest's answer format: per problem its id and the letters of its questions, "A" where nothing could be
    read, since an empty answer is surely wrong."""
    problems: dict[str, list[dict[str, str]]] = defaultdict(list)
    for question, prediction in zip(questions, predictions, strict=True):
        problems[question.problem_id].append({"answer": prediction.answer or "A"})
    return "".join(
        json.dumps({"id": problem, "questions": letters}, ensure_ascii=False) + "\n"
        for problem, letters in problems.items()
    )
