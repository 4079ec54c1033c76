"""Rehearsals on fake tensors, held against models of full depth and against what is planned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from stepladder.config import Quantise, Train
from stepladder.forecast import memory
from stepladder.forecast.model_shape import Shape
from stepladder.rehearsal import depths, rehearsal
from stepladder.rehearsal.answers import rehearse_answers
from stepladder.rehearsal.layer import rehearse_layer
from stepladder.rehearsal.step import rehearse_step
from stepladder.rehearsal.tracking import LiveMemory

SMALL = Shape(6, 128, 384, 4, 2, 32, 1000, tied=False)
TRAIN = Train(lora_rank=16, lora_alpha=32, batch_size=1, gradient_accumulation=8, lora_dropout=0.05)


def step(layers: int, **more: Any) -> dict[str, Counter[str]]:
    settings = TRAIN.model_copy(update={"qlora": more.pop("qlora", False)})
    return rehearse_step(depths.skeleton(depths.architecture(SMALL), layers), settings, 64, 32, **more)


@pytest.mark.parametrize("more", [{}, {"checkpointing": False}, {"cards": 4}, {"qlora": True}])
def test_two_depths_tell_of_a_deep_model(more: dict[str, Any]) -> None:
    if more.get("qlora"):
        pytest.importorskip("bitsandbytes")
    whole = max(step(SMALL.layers, **more).values(), key=Counter.total)
    told = depths.at_depth(SMALL.layers, lambda layers: step(layers, **more))
    assert told.total() == pytest.approx(whole.total(), rel=0.01)


def test_what_is_freed_is_not_counted() -> None:
    live = LiveMemory(1000)
    with live:
        left = torch.ones(64, 32)
        product = left @ left.T
        del left
        live.hold(product, "weights")
    assert live.live.total() == live.live["weights"] == 64 * 64 * 4
    assert live.peaks["start"].total() == (64 * 64 + 64 * 32) * 4


def test_weights_and_adapter_are_counted_whole() -> None:
    peak = step(2)["forward"]
    shape = SMALL._replace(layers=2)
    biases = 2 * 2 * (128 + 2 * 64)
    assert peak["weights"] == 2 * shape.parameters + biases
    assert peak["adapter"] == 4 * memory.lora_parameters(shape, 16)
    assert peak["optimiser"] == pytest.approx(2 * peak["adapter"], rel=0.01)


def test_cards_share_weights_and_optimiser() -> None:
    alone, shared = step(3)["forward"], step(3, cards=4)["forward"]
    for kind in ("weights", "adapter", "optimiser"):
        assert shared[kind] == pytest.approx(alone[kind] / 4, rel=0.02)


def test_the_gptq_of_a_layer() -> None:
    pytest.importorskip("llmcompressor")
    model = depths.skeleton(depths.architecture(SMALL), 1).to(torch.bfloat16)  # type: ignore[arg-type]
    peak = max(rehearse_layer(model, 64, Quantise(group_size=32)).values(), key=Counter.total)
    planned = memory.quantising_layer(SMALL, 64)
    assert peak.total() == pytest.approx(planned.total - planned.runtime, rel=0.15)


def test_a_batch_of_answers() -> None:
    model = depths.skeleton(depths.architecture(SMALL), 2)
    (peak,) = rehearse_answers(model, 8, 192, 64).values()
    planned = memory.answering(SMALL._replace(layers=2), 8, 256, prompt=192, bytes_each=4)
    assert peak.total() == pytest.approx(planned.total - planned.runtime, rel=0.15)


def test_a_student_is_rehearsed_in_its_own_number_format() -> None:
    row = {
        dtype: rehearsal.training(
            rehearsal.Student(depths.architecture(SMALL), SMALL, dtype), TRAIN, 64, 32, checkpointing=True
        )
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert row[torch.float32].peak["weights"] == 2 * row[torch.bfloat16].peak["weights"]
