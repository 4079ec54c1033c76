"""predictions: base, merged and quantised models answer validation and test; every answer is kept. Final weights, which
learned the validation labels, answer those questions too, for the self-test of a package."""

from __future__ import annotations

from pathlib import Path

from stepladder import models, records
from stepladder.answering.voting import predict
from stepladder.config import BASE, Config, settings
from stepladder.context import Context
from stepladder.records import Question
from stepladder.stages.quantised import verdict
from stepladder.workspace import Artifact, write_atomic


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {"questions": context.digest_of("questions")} | context.prompts_digest()
    if part == BASE:
        inputs["base"] = models.content_digest(models.locate(config.train.base))
    else:
        inputs |= {system: context.digest_of(system, part) for system in ("merged", "quantised")}
    if part != BASE and config.predict.merged_test == "leader" and not context.is_final:
        inputs["leader"] = leader(context)
    chosen_settings = {"predict": settings(config.predict), "seed": config.seed}
    return Artifact(context.input("predictions", part), chosen_settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    for system, weights in _systems(context, part).items():
        by_split = {
            split: records.read(context.input("questions") / f"{split}.jsonl", Question)
            for split in splits(context.config)
            if system != "merged" or split != "test" or _merged_answers_test(context, part)
        }
        all_questions = [question for questions in by_split.values() for question in questions]
        answers = iter(predict(context, str(part), weights, all_questions, system))
        for split, questions in by_split.items():
            write_atomic(folder / f"{system}.{split}.jsonl", records.lines(next(answers) for _ in questions))


def splits(config: Config) -> tuple[str, ...]:
    """The splits that are answered."""
    return ("validation",) if config.questions.test is None else ("validation", "test")


def leader(context: Context) -> str:
    """The eligible member with the highest validation accuracy after quantising; the first of equals."""
    scores = {name: verdict(context, name).quantised for name in eligible(context)}
    return max(scores, key=lambda name: scores[name])


def eligible(context: Context) -> list[str]:
    """The members that may be in the ensemble. One with a control (the same member without variants) must be at least
    as accurate as its control on validation."""
    scores = {member.name: verdict(context, member.name).quantised for member in context.config.member}
    return [
        member.name
        for member in context.config.member
        if member.control is None or scores[member.name] >= scores[member.control]
    ]


def _systems(context: Context, part: str | None) -> dict[str, Path]:
    """The models that answer for one part, as system -> folder of weights."""
    if part == BASE:
        return {BASE: models.locate(context.config.train.base)}
    return {system: context.input(system, part) for system in ("merged", "quantised")}


def _merged_answers_test(context: Context, part: str | None) -> bool:
    """Whether the merged weights answer the test: those of final weights are measured nowhere."""
    if context.is_final:
        return False
    return context.config.predict.merged_test == "all" or part == leader(context)
