"""trainset: choose each member's chains; remove duplicates, and problems that are also in validation or test. Of the
final weights: from the chains of training and validation questions together."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from stepladder import models, records
from stepladder.config import Config, Member, Train, settings
from stepladder.context import Context
from stepladder.documents import Lengths, TrainsetCard, Twin
from stepladder.errors import UserError
from stepladder.mcq.answer import with_final_line
from stepladder.mcq.mixture import BY_SCORE, Measures, Mixture, mixture
from stepladder.mcq.overlap import problem_text
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import rng, shown
from stepladder.models import template
from stepladder.nodes.chosen import workers_of
from stepladder.records import Example, Message, Question, Sample, Split
from stepladder.reporting.data_card import REASONS, markdown, student_name
from stepladder.shards.each import PIECE_BYTES, Pool
from stepladder.shards.twins import near_held_out
from stepladder.training.fit import fits
from stepladder.training.sequences import tokenise
from stepladder.workspace import Artifact, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    mix = member(config, part)
    student = models.locate(student_name(config, mix))
    chosen_settings = {"member": settings(mix), "max_length": config.train.max_length}
    if mix.choose in BY_SCORE and config.train.dtype != "auto":
        chosen_settings["dtype"] = config.train.dtype
    inputs = {
        "questions": context.digest_of("questions"),
        "student": models.content_digest(student),
    } | context.prompts_digest()
    for source in context.sources:
        for stage in ("samples", "variants") if mix.variants else ("samples",):
            inputs[source.label(stage)] = source.digest_of(stage)
    return Artifact(context.input("trainset", part), chosen_settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    config, mix = context.config, member(context.config, part)
    folder_of_splits = context.input("questions")
    by_split = {name: records.read(folder_of_splits / f"{name}.jsonl", Question) for name in get_args(Split)}
    questions = {q.id: q for name in context.taught for q in by_split[name]}
    held_out = [q for name in by_split if name not in context.taught for q in by_split[name]]
    scratch = artifact(context, part).scratch()
    twins = _twins(Pool(workers_of(config.cluster), scratch, context.progress.update), questions.values(), held_out)
    share = draw_problems(mix, sorted({q.problem_id for q in questions.values()}))
    samples = taught_by(mix, _accepted(context))
    for source in context.sources if mix.variants else ():
        questions |= {q.id: q for q in records.read(source.input("variants") / "questions.jsonl", Question)}
        samples += records.read(source.input("variants") / "accepted.jsonl", Sample)
    chosen = [sample for sample in samples if questions[sample.question_id].problem_id in share]
    student = models.locate(student_name(config, mix))
    tokenizer = models.load_tokenizer(student)
    report = partial(context.progress.update, "chain under the base")
    measures = measured_by(student, tokenizer, mix, config.train, questions, config.student_prompts, report)
    learned = mixture(mix, chosen, questions, measures, {twin.problem for twin in twins})
    removed = learned.left_out
    kept: dict[tuple[Message, ...], Example] = {}
    for sample in learned.samples:
        example = example_of(questions[sample.question_id], sample, config.student_prompts)
        kept.setdefault(example.messages, example)
    removed["duplicates"] = len(learned.samples) - len(kept)

    lengths, examples = [], []
    for example in kept.values():
        for row in tokenise(tokenizer, [example], config.train.max_length):  # no row where it is too long
            lengths.append(len(row.ids))
            examples.append(example)
    removed["left_out"] = len(kept) - len(examples)
    if not examples:
        counts = removed + learned.flawed
        reasons = "".join(f"; {counts[key]:,} left out {why}" for key, why in REASONS.items() if counts[key])
        raise UserError(
            f"member {part!r} has nothing to learn from: {len(chosen):,} of {len(samples):,} accepted chains are in "
            f"its mix{reasons}; widen its teachers or share, or add a rung that solves more"
        )
    card = _card(examples, lengths, learned, twins, [questions[example.question_id] for example in examples])
    if context.is_final:
        card = card.model_copy(update={"labels": context.taught})
    write_atomic(folder / "train.jsonl", records.lines(examples))
    card.write(folder)
    write_atomic(folder / "README.md", markdown(config, mix, card))
    template.write(tokenizer, folder)


def member(config: Config, part: str | None) -> Member:
    """The member of this name."""
    return next(member for member in config.member if member.name == part)


def _accepted(context: Context) -> list[Sample]:
    """The accepted chains that may be learned from.

    Raises:
        UserError: there is none that the chosen weights did not learn from.
    """
    by_source = [records.read(source.input("samples") / "accepted.jsonl", Sample) for source in context.sources]
    if context.is_final and not by_source[-1]:
        raise UserError(
            "final = 'all' has nothing to add: no chain of a validation question was accepted; add a rung that solves "
            "more, or set final = 'none'"
        )
    return [sample for samples in by_source for sample in samples]


def taught_by(mix: Member, samples: Iterable[Sample]) -> list[Sample]:
    """The samples of the teachers that a member learns from."""
    return [sample for sample in samples if not mix.teachers or {sample.rung, sample.model} & set(mix.teachers)]


def draw_problems(mix: Member, problems: list[str]) -> set[str]:
    """The share of the problems that a member sees."""
    count = max(1, round(mix.share * len(problems)))
    return set(rng("share", mix.seed).sample(problems, count))


def _twins(pool: Pool, questions: Iterable[Question], held_out: Iterable[Question]) -> list[Twin]:
    """Training problems that are also in validation or test, in the same or nearly the same words."""
    training, evaluation = _by_problem(questions), _by_problem(held_out)
    texts = pool.folder / "texts.jsonl"
    write_atomic(
        texts, (json.dumps([name, problem_text(group)], ensure_ascii=False) + "\n" for name, group in training.items())
    )
    orders = [{"file": str(texts.absolute()), "span": span} for span in records.spans(texts, PIECE_BYTES)]
    found = near_held_out(pool, map(problem_text, evaluation.values()), "shared_texts", orders)
    evaluation_ids = [*evaluation]
    twins = {
        near.id: Twin(problem=near.id, of=evaluation_ids[near.held_out], similarity=round(near.similarity, 4))
        for near in reversed(found)
    }
    problem_of = {_canonical(question): question.problem_id for group in evaluation.values() for question in group}
    for problem, group in training.items():
        for question in group:
            if _canonical(question) in problem_of:
                twins[problem] = Twin(problem=problem, of=problem_of[_canonical(question)], similarity=1.0)
    return [twins[problem] for problem in sorted(twins)]


def _by_problem(questions: Iterable[Question]) -> dict[str, list[Question]]:
    by_problem: dict[str, list[Question]] = {}
    for question in questions:
        by_problem.setdefault(question.problem_id, []).append(question)
    return by_problem


def _canonical(question: Question) -> tuple[str, str, tuple[str, ...]]:
    """A question's texts without differences in white space or the order of the options."""
    return (
        " ".join(question.problem.split()),
        " ".join(question.question.split()),
        tuple(sorted(question.options)),
    )


def measured_by(
    student: Path,
    tokenizer: PreTrainedTokenizerBase,
    mix: Member,
    train: Train,
    questions: Mapping[str, Question],
    prompts: Path | None = None,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Measures:
    """How a student, by its folder and tokenizer, sees the chains that a member may choose from. A chain that is too
    long to train on has an infinite score."""

    def tokens(chain: str) -> int:
        return len(tokenizer.encode(chain, add_special_tokens=False))

    def scores(samples: Sequence[Sample]) -> list[float]:
        conversations = [example_of(questions[sample.question_id], sample, prompts) for sample in samples]
        rows = [tokenise(tokenizer, [conversation], train.max_length) for conversation in conversations]
        found = iter(fits(student, [row for fitting in rows for row in fitting], train.dtype, report))
        every = [next(found) if fitting else None for fitting in rows]
        return [math.inf if fit is None else fit.surprisal if mix.choose == "likely" else fit.ratio for fit in every]

    return Measures(tokens, scores)


def example_of(question: Question, sample: Sample, prompts: Path | None = None) -> Example:
    """The conversation that teaches a sample's chain. ``prompts`` is the student's own prompt folder, if it has one."""
    options = shown(question.options, sample.permutation)
    answer = Message(role="assistant", content=with_final_line(sample.text, options, question.language))
    return Example(
        messages=(*ask_messages(question, sample.permutation, prompts), answer),
        question_id=question.id,
        teacher=sample.model,
    )


def _card(
    examples: Sequence[Example], lengths: list[int], learned: Mixture, twins: list[Twin], questions: list[Question]
) -> TrainsetCard:
    removed = learned.left_out
    letters = Counter(example.messages[-1].content[-1] for example in examples)
    quantiles = statistics.quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
    return TrainsetCard(
        examples=len(examples),
        questions=len({question.id for question in questions}),
        problems=len({question.problem_id for question in questions}),
        tokens=sum(lengths),
        length=Lengths(median=quantiles[9], p95=quantiles[18], longest=max(lengths)),
        teachers=dict(sorted(Counter(example.teacher for example in examples).items())),
        sources=dict(sorted(Counter(question.source for question in questions).items())),
        letters=dict(sorted(letters.items())),
        left_out=removed["left_out"],
        leaked=removed["leaked"],
        other_language=removed["other_language"],
        long_chain=removed["long_chain"],
        same_chain=removed["same_chain"],
        duplicates=removed["duplicates"],
        flawed=dict(learned.flawed.most_common()),
        cleaned=dict(learned.cleaned.most_common()),
        in_one_order=learned.in_one_order,
        twins=tuple(twins),
    )
