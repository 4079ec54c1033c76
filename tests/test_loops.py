"""Answers that go in circles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from stepladder.ask.local import decoding
from stepladder.ask.local.engine import Local
from stepladder.ask.loops import MAX_PASSAGE, MIN_PASSAGE, REPEATS, goes_in_circles
from stepladder.ask.request import Request
from stepladder.records import Message


@pytest.mark.parametrize("size", [MIN_PASSAGE, 13, MAX_PASSAGE])
def test_a_passage_over_and_over_is_a_circle(size: int) -> None:
    passage = random.Random(size).sample(range(1000), size)
    begun = [7, 8, 9]
    assert goes_in_circles(begun + passage * REPEATS)
    assert not goes_in_circles(begun + passage[1:] + passage * (REPEATS - 1))
    assert not goes_in_circles(begun + passage * REPEATS + [1001])


def test_a_line_of_dashes_is_none_and_a_page_of_them_is() -> None:
    assert not goes_in_circles([1, 2] + [5] * (MIN_PASSAGE * REPEATS - 1))
    assert goes_in_circles([1, 2] + [5] * MIN_PASSAGE * REPEATS)
    assert not goes_in_circles([])
    assert not goes_in_circles(range(500))


def test_an_answer_in_circles_is_cut(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two rows repeats itself after ten tokens, the second ends by itself after that."""
    engine = Local.load(base)
    end = next(iter(engine._ends))
    said = [list(range(100, 110)) + [*range(200, 220)] * 20, [*range(300, 450), end]]

    def scripted(logits: torch.Tensor, sampling: Sequence[object]) -> list[int]:
        return [tokens.pop(0) for tokens in said[-len(sampling) :]]

    monkeypatch.setattr(decoding, "_choose", scripted)
    asked = [
        Request(model="m", messages=(Message(role="user", content=text),), max_tokens=400, final=True)
        for text in ("one", "two")
    ]
    first, second = engine.answer(asked)
    assert (first.finish, first.completion_tokens) == ("length", 10 + 20 * REPEATS)
    assert (second.finish, second.completion_tokens) == ("stop", 150)
