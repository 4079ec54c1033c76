"""What a run's steps would take, on fake tensors, beside what ``plan`` says by arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stepladder import models
from stepladder.ask.local import BATCH_SIZE
from stepladder.config import Config, Quantise, Train
from stepladder.forecast import memory
from stepladder.forecast.memory import Parts
from stepladder.forecast.model_shape import Shape
from stepladder.forecast.workload import Workload
from stepladder.quantising import gptq
from stepladder.rehearsal.answers import rehearse_answers
from stepladder.rehearsal.depths import at_depth, skeleton
from stepladder.rehearsal.layer import rehearse_layer
from stepladder.rehearsal.step import rehearse_step
from stepladder.rehearsal.tracking import Bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rehearsed(NamedTuple):
    """A step of a run, rehearsed and planned: bytes on each card, or in host memory, without what libraries take."""

    step: str
    peak: Bytes
    """By kind, at the highest moment."""
    planned: float

    @property
    def deviation(self) -> float:
        """How far the plan is from the rehearsal, as a share."""
        return self.planned / self.peak.total() - 1


class Student(NamedTuple):
    """The model of a rehearsal."""

    architecture: Mapping[str, Any]
    """What its config.json says."""
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    """Number format to compute in."""

    def of_depth(self, layers: int) -> PreTrainedModel:
        """It with so many layers, on the meta device."""
        model = skeleton(self.architecture, layers)
        model.to(self.dtype)  # type: ignore[arg-type]
        return model

    def peak(self, rehearse: Callable[[PreTrainedModel], Mapping[str, Bytes]]) -> Bytes:
        """The highest peak at its whole depth."""
        return at_depth(self.shape.layers, lambda layers: rehearse(self.of_depth(layers)))


def rehearse(config: Config, student: Student, workload: Workload) -> Iterator[Rehearsed]:
    """Rehearse what a run does on cards: a training step, the GPTQ of a layer, and where the embedded engine answers a
    batch of it. vLLM is not rehearsed: it fills the share of a card that it may."""
    train, quantise = config.train, config.quantise
    scored = train.batch_size * train.max_length // 2
    checkpointing = train.gradient_checkpointing is not False
    yield training(student, train, train.max_length, scored, checkpointing=checkpointing)
    prompt, answer = round(workload.prompt), round(workload.answer)
    longest = max(prompt + answer, *(general.max_length for general in quantise.general), 0)
    yield quantising(student, quantise, longest)
    texts = quantise.samples + sum(general.samples for general in quantise.general)
    yield quantising_on_host(student, quantise, texts, prompt + answer)
    if config.predict.engine == "local":
        rows = min(BATCH_SIZE, workload.questions * workload.votes)
        yield answering(student, rows, prompt, answer)


def training(student: Student, train: Train, tokens: int, scored: int, *, checkpointing: bool) -> Rehearsed:
    """Rehearse a step of ``[train]``.

    Args:
        student: the base.
        train: the settings; with ``sharding = "fsdp"`` its devices share weights and optimiser.
        tokens: in each sequence of the batch.
        scored: completion tokens in the batch.
        checkpointing: whether activations are computed again.
    """
    cards = train.devices if train.sharding != "none" else 1
    peak = student.peak(
        lambda model: rehearse_step(
            model, train, tokens, scored, dtype=student.dtype, checkpointing=checkpointing, cards=cards
        )
    )
    all_tokens = train.batch_size * tokens
    planned = memory.training(
        student.shape, train.lora_rank, all_tokens, scored, bytes_each=student.dtype.itemsize,
        checkpointing=checkpointing, qlora=train.qlora, cards=cards,
        accumulates=train.gradient_accumulation > train.devices,
    )  # fmt: skip
    kind = "QLoRA" if train.qlora else "LoRA"
    where = "1 card" if cards == 1 else f"each of {cards} cards"
    return Rehearsed(
        f"{kind} rank {train.lora_rank}, {all_tokens:,} tokens, {where}", peak, _without_libraries(planned)
    )


def quantising(student: Student, settings: Quantise, tokens: int) -> Rehearsed:
    """Rehearse the GPTQ of a layer on a card; ``tokens``: of the longest calibration text."""
    with models.quiet():
        peaks = rehearse_layer(student.of_depth(1), tokens, settings)
    planned = memory.quantising_layer(student.shape, tokens, bytes_each=student.dtype.itemsize)
    highest = max(peaks.values(), key=Counter.total)
    return Rehearsed(f"GPTQ of a layer, texts of {tokens:,} tokens", highest, _without_libraries(planned))


def quantising_on_host(
    student: Student, settings: Quantise, texts: int, tokens: int, *, has_card: bool = True
) -> Rehearsed:
    """Rehearse what GPTQ holds in host memory: all weights, with the scales that they will get, and the states of all
    calibration texts between two layers; without a card also the layer at work.

    Args:
        student: the merged model.
        settings: ``[quantise]``.
        texts: number of calibration texts.
        tokens: in a text, on average.
        has_card: whether layers are quantised on a card.
    """
    one_layer, two_layers = (_held(student.of_depth(layers), settings) for layers in (1, 2))
    held = one_layer + (student.shape.layers - 1) * (two_layers - one_layer)
    peak: Bytes = Counter(weights=held, states=texts * tokens * student.shape.hidden * student.dtype.itemsize)
    planned = memory.quantising(student.shape, texts, tokens, bytes_each=student.dtype.itemsize)
    if has_card:
        planned = planned._replace(layer=0)
    else:
        with models.quiet():
            peaks = rehearse_layer(student.of_depth(1), tokens, settings)
        highest = max(peaks.values(), key=lambda moment: moment.total() - moment["weights"])
        peak += highest - Counter(weights=highest["weights"])
    return Rehearsed(f"GPTQ of {texts} texts, host memory", peak, _without_libraries(planned))


def _held(model: PreTrainedModel, settings: Quantise) -> int:
    """Bytes of a model's parameters when GPTQ has given them their scales and zero points."""
    from llmcompressor.core import State

    modifier = gptq.gptq_modifier(settings, gptq.group_size(settings, gptq.linears(model)))
    with models.quiet():
        modifier.on_initialize(State(model=model))
    return sum(tensor.nbytes for tensor in model.parameters())


def answering(student: Student, rows: int, prompt: int, answer: int) -> Rehearsed:
    """Rehearse a batch of the embedded engine.

    Args:
        student: the model.
        rows: requests in the batch, which share no tokens.
        prompt: tokens of each prompt.
        answer: tokens that an answer may have.
    """
    peak = student.peak(lambda model: rehearse_answers(model, rows, prompt, answer))
    planned = memory.answering(student.shape, rows, prompt + answer, prompt=prompt, bytes_each=student.dtype.itemsize)
    return Rehearsed(f"{rows} answers at once, {prompt} + {answer} tokens", peak, _without_libraries(planned))


def _without_libraries(parts: Parts) -> float:
    return parts.total - parts.runtime
