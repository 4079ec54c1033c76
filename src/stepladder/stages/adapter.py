"""adapter: LoRA fine-tuning of each member; a finished adapter is copied."""

from __future__ import annotations

import functools
from pathlib import Path

from stepladder import models, records
from stepladder.answering.cascade import WORKED
from stepladder.answering.voting import conversation, examine
from stepladder.config import settings
from stepladder.context import Context
from stepladder.errors import ModelError, UserError
from stepladder.forecast import memory, model_shape
from stepladder.mcq.answer import ANSWER_LINE
from stepladder.mcq.mixture import without_debris
from stepladder.mcq.prompts import worked_solution
from stepladder.models import template
from stepladder.nodes.chosen import nodes_of
from stepladder.nodes.gang import Gang
from stepladder.records import Example, Question, Sample
from stepladder.reporting.content import TrainingStep
from stepladder.serving import cards
from stepladder.stages.samples import VALIDATION_ACCEPTED
from stepladder.stages.trainset import example_of, member, taught_by
from stepladder.training import distributed, merging, swift, trl
from stepladder.training.data import Data
from stepladder.workspace import Artifact, file_digest


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    if (finished := member(config, part).path) is not None:
        given = {"adapter": models.content_digest(models.locate_adapter(finished))}
        given["base"] = models.content_digest(models.locate(config.train.base))
        return Artifact(context.input("adapter", part), {}, given)
    # The digest of the base is among the inputs; its path changes nothing.
    chosen_settings = {
        "train": settings(config.train, without=("base", "tensorboard")),
        "seed": member(config, part).seed,
    }
    inputs = {
        "trainset": context.digest_of("trainset", part),
        "base": models.content_digest(models.locate(config.train.base)),
    }
    if context.is_final:
        chosen_settings["last_epoch"] = _last_epoch(context, part)
    elif config.train.asks_validation:
        inputs["validation"] = file_digest(context.input("samples") / VALIDATION_ACCEPTED)
    return Artifact(context.input("adapter", part), chosen_settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    base = models.locate(context.config.train.base)
    if (finished := member(context.config, part).path) is not None:
        trained_on = merging.adopt_adapter(models.locate_adapter(finished), base, folder)
        context.progress.say(f"adapter/{part}: {finished}, by its own words of {trained_on or 'an unnamed base'}")
        return
    gang = _gang(context)
    if gang is None:
        _check_cards(context, base)
    trainset = context.input("trainset", part)
    template.check(models.load_tokenizer(base), trainset)
    examples = records.read(trainset / "train.jsonl", Example)

    def report(step: int, steps: int, note: str, loss: float | None) -> None:
        context.progress.update("step", step, steps, note, loss)

    settings, seed = context.config.train, member(context.config, part).seed
    if context.is_final:  # every label trains, so there is nothing to measure and nothing more to choose
        settings = settings.model_copy(update={"patience": None, "metric": "loss"})
        data = Data(examples, last_epoch=_last_epoch(context, part))
    else:
        questions = records.read(context.input("questions") / "validation.jsonl", Question)
        exam = functools.partial(examine, context, questions) if settings.metric == "accuracy" else None
        data = Data(examples, _held_out(context, part, questions), exam)
    scratch = artifact(context, part).scratch(models.dtype_name(settings.dtype))
    if settings.backend == "swift":
        swift.train(settings, seed, base, data, folder, scratch, report, gang)
    elif settings.devices > 1:
        distributed.train(settings, seed, base, data, folder, scratch, report, gang)
    else:
        trl.train(settings, seed, base, data, folder, scratch, report)


def _gang(context: Context) -> Gang | None:
    """The nodes that a training is spread over; None where it stays on this machine."""
    cluster = context.config.cluster
    if cluster is None or cluster.train_nodes == 1:
        return None
    return Gang(nodes_of(cluster), cluster.train_nodes, context.progress.say)


def _check_cards(context: Context, base: Path) -> None:
    """Check that other programs leave enough of the cards for training; out of memory it would end with a traceback,
    perhaps after hours. (Not run on a card.)

    Raises:
        UserError: they do not; it names them.
    """
    settings = context.config.train
    held = cards.taken()
    if not held or (settings.backend == "trl" and not models.has_cuda()):
        return
    try:
        shape = model_shape.read(base)
    except ModelError:  # an architecture whose memory is not known
        return
    tokens = settings.batch_size * settings.max_length
    needed_bytes = memory.training(
        shape,
        settings.lora_rank,
        tokens,
        tokens // 2,
        checkpointing=settings.gradient_checkpointing is not False,
        qlora=settings.qlora,
        cards=settings.devices if settings.sharding != "none" else 1,
        accumulates=settings.gradient_accumulation > settings.devices,
    ).total
    free_bytes = [size for size in cards.free_bytes()[: settings.devices] if size is not None]
    if free_bytes and needed_bytes > min(free_bytes):
        raise UserError(
            f"training needs about {needed_bytes / 2**30:.1f} GiB of each card, and {min(free_bytes) / 2**30:.1f} GiB "
            f"are free: {'; '.join(held)}; end it, or give the run other cards (CUDA_VISIBLE_DEVICES)"
        )


def _last_epoch(context: Context, part: str | None) -> int | None:
    """The epoch whose adapter early stopping kept, counted from one; None where all epochs are trained."""
    settings = context.config.train
    if settings.patience is None:
        return None
    log = records.read(context.chosen.input("adapter", part) / "log.jsonl", TrainingStep)
    if settings.metric == "accuracy":
        measured = [step.validation_accuracy for step in log if step.validation_accuracy is not None]
        return 1 + measured.index(max(measured))
    losses = [step.validation_loss for step in log if step.validation_loss is not None]
    return 1 + losses.index(min(losses))


def _held_out(context: Context, part: str | None, questions: list[Question]) -> list[Example]:
    """The examples that validation loss is measured on: worked solutions of validation questions; for those without
    one, where the ladder was asked, its first accepted chain, of the member's own teachers where they have one. Of a
    member that learns letters: the labels."""
    mix = member(context.config, part)
    if mix.learns == "letters":
        return [conversation(context, q, ANSWER_LINE[q.language].format(q.answer), "label") for q in questions]
    orders = ((question, tuple(range(len(question.options)))) for question in questions)
    texts = ((question, worked_solution(question, order)) for question, order in orders)
    examples = [conversation(context, question, text, WORKED) for question, text in texts if text is not None]
    if not context.config.train.asks_validation:
        return examples
    samples = records.read(context.input("samples") / VALIDATION_ACCEPTED, Sample)
    first: dict[str, Sample] = {}
    by_id = {question.id: question for question in questions}
    for sample in (*taught_by(mix, samples), *samples):
        chain = without_debris(mix, by_id[sample.question_id], sample)
        if chain.flaw is None:
            first.setdefault(sample.question_id, sample.model_copy(update={"text": chain.text}))
    return examples + [
        example_of(by_id[name], sample, context.config.student_prompts) for name, sample in sorted(first.items())
    ]
