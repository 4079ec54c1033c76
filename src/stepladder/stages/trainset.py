"""trainset: choose each member's chains, remove duplicates and what leaks from validation or test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from stepladder import models, records, template
from stepladder.config import Config, Member, settings
from stepladder.mcq.answer import as_asked
from stepladder.mcq.overlap import TWIN, near_duplicates, whole
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import rng, shown
from stepladder.records import Example, Message, Question, Sample
from stepladder.stages.flow import Context, digest_of, members
from stepladder.training.packing import tokenise
from stepladder.workspace import Artifact, write_atomic

parts = members


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    student = models.locate(config.train.base)
    chosen = {"member": settings(member(config, part)), "max_length": config.train.max_length}
    inputs = {
        "questions": digest_of(context, "questions"),
        "samples": digest_of(context, "samples"),
        "student": models.content_digest(student),
    }
    return Artifact(context.workspace.path("trainset", part), chosen, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    mix = member(context.config, part)
    source = context.input("questions")
    questions = {q.id: q for q in records.read(source / "train.jsonl", Question)}
    held_out = [q for name in ("validation", "test") for q in records.read(source / f"{name}.jsonl", Question)]
    samples = records.read(context.input("samples") / "accepted.jsonl", Sample)

    mine = _share(mix, sorted({q.problem_id for q in questions.values()}))
    chosen = [
        sample
        for sample in samples
        if (not mix.teachers or {sample.rung, sample.model} & set(mix.teachers))
        and questions[sample.question_id].problem_id in mine
    ]
    leaked_texts = {_text(question) for question in held_out}
    twins = _twins(questions.values(), held_out)
    kept: dict[tuple[Message, ...], Example] = {}
    leaked = 0
    for sample in chosen:
        question = questions[sample.question_id]
        if question.problem_id in twins or _text(question) in leaked_texts:
            leaked += 1
            continue
        example = _example(question, sample)
        kept.setdefault(example.messages, example)

    tokenizer = models.load_tokenizer(models.locate(context.config.train.base))
    tokens = 0
    examples = []
    for example in kept.values():
        for row in tokenise(tokenizer, [example], context.config.train.max_length):  # none where it does not fit
            tokens += len(row.ids)
            examples.append(example)
    letters = Counter(example.messages[-1].content[-1] for example in examples)
    card = {
        "examples": len(examples),
        "tokens": tokens,
        "left_out": len(kept) - len(examples),
        "teachers": dict(sorted(Counter(example.teacher for example in examples).items())),
        "letters": dict(sorted(letters.items())),
        "leaked": leaked,
        "duplicates": len(chosen) - leaked - len(kept),
    }
    write_atomic(folder / "train.jsonl", records.lines(examples))
    write_atomic(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    template.write(tokenizer, folder)


def member(config: Config, part: str | None) -> Member:
    """The member a part is named after."""
    return next(member for member in config.member if member.name == part)


def _share(mix: Member, problems: list[str]) -> set[str]:
    count = max(1, round(mix.share * len(problems)))
    return set(rng("share", mix.seed).sample(problems, count))


def _twins(questions: Iterable[Question], held_out: Iterable[Question]) -> set[str]:
    """Training problems that are nearly one of validation or test."""
    ours, theirs = _by_problem(questions), _by_problem(held_out)
    pairs = near_duplicates([*map(whole, ours.values())], [*map(whole, theirs.values())], TWIN)
    return {[*ours][pair.left] for pair in pairs}


def _by_problem(questions: Iterable[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.problem_id, []).append(question)
    return found


def _text(question: Question) -> tuple[str, str, tuple[str, ...]]:
    """What makes two questions the same to a reader: spaces and the order of the options do not."""
    return (
        " ".join(question.problem.split()),
        " ".join(question.question.split()),
        tuple(sorted(question.options)),
    )


def _example(question: Question, sample: Sample) -> Example:
    options = shown(question.options, sample.permutation)
    answer = Message(role="assistant", content=as_asked(sample.text, options, question.language))
    return Example(
        messages=(*ask_messages(question, sample.permutation), answer),
        question_id=question.id,
        teacher=sample.model,
    )
