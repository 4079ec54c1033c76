"""adapter: LoRA fine-tuning of each member."""

from __future__ import annotations

import functools
from pathlib import Path

from stepladder import models, records
from stepladder.answering.cascade import WORKED
from stepladder.answering.voting import conversation, examine
from stepladder.config import settings
from stepladder.context import Context
from stepladder.mcq.prompts import worked_solution
from stepladder.models import template
from stepladder.records import Example, Question
from stepladder.stages.trainset import member
from stepladder.training import distributed, swift, trl
from stepladder.training.data import Data
from stepladder.workspace import Artifact


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    # The base is known by its content below; where it lies changes nothing.
    chosen = {"train": settings(config.train, without=("base", "tensorboard")), "seed": member(config, part).seed}
    inputs = {
        "trainset": context.digest_of("trainset", part),
        "base": models.content_digest(models.locate(config.train.base)),
    }
    return Artifact(context.workspace.path("adapter", part), chosen, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    base = models.locate(context.config.train.base)
    trainset = context.input("trainset", part)
    template.check(models.load_tokenizer(base), trainset)
    examples = records.read(trainset / "train.jsonl", Example)

    def report(step: int, steps: int, loss: float) -> None:
        context.progress.update("step", step, steps, f"loss {loss:.3f}")

    settings, seed = context.config.train, member(context.config, part).seed
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    exam = functools.partial(examine, context, questions) if settings.metric == "accuracy" else None
    data = Data(examples, _held_out(context, questions), exam)
    alone = trl.train if settings.devices == 1 else distributed.train
    trainer = swift.train if settings.backend == "swift" else alone
    scratch = artifact(context, part).scratch(models.dtype_name(settings.dtype))
    trainer(settings, seed, base, data, folder, scratch, report)


def _held_out(context: Context, questions: list[Question]) -> list[Example]:
    """What validation loss is measured on: the worked solutions of validation questions, which nobody trains on."""
    orders = ((question, tuple(range(len(question.options)))) for question in questions)
    texts = ((question, worked_solution(question, order)) for question, order in orders)
    return [conversation(context, question, text, WORKED) for question, text in texts if text is not None]
