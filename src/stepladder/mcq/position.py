"""Does a model answer what is asked, or where the answer stands? Measured on its answers to shuffled options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

from stepladder.mcq.shuffle import to_shown
from stepladder.records import Question, Sample


class Bias(NamedTuple):
    """One model's answers by the letter they stand at."""

    model: str
    answers: int
    recall: dict[str, float]
    """By the letter at which the right option was shown: share answered rightly; an unreadable answer is not right."""
    chosen: dict[str, float]
    """Share of the readable answers that named each letter."""
    shown: dict[str, float]
    """Share of the answers where the right option stood at each letter."""
    consistency: float | None
    """Of two readable answers to one question in different orders, how often both name the same option; None where no
    question was answered twice."""


def position_bias(samples: Iterable[Sample], questions: Mapping[str, Question]) -> list[Bias]:
    """One row per model that was asked, in order of their names; worked solutions are not answers.

    A rung that asks for another order only where the one before was right says nothing about consistency: what it asks
    twice was right once already.
    """
    of_model: dict[str, list[Sample]] = {}
    for sample in samples:
        of_model.setdefault(sample.model, []).append(sample)
    return [_of(model, some, questions) for model, some in sorted(of_model.items())]


def _of(model: str, samples: list[Sample], questions: Mapping[str, Question]) -> Bias:
    right: dict[str, list[bool]] = {}
    chosen: list[str] = []
    readable: dict[str, list[Sample]] = {}
    for sample in samples:
        label = questions[sample.question_id].answer
        if label is not None:
            right.setdefault(to_shown(label, sample.permutation), []).append(sample.answer == label)
        if sample.answer is not None:
            chosen.append(to_shown(sample.answer, sample.permutation))
            readable.setdefault(sample.question_id, []).append(sample)
    same = [
        one.answer == other.answer
        for some in readable.values()
        for one, other in combinations(some, 2)
        if one.permutation != other.permutation
    ]
    counted = sum(map(len, right.values()))
    return Bias(
        model=model,
        answers=len(samples),
        recall={letter: sum(hits) / len(hits) for letter, hits in sorted(right.items())},
        chosen={letter: chosen.count(letter) / len(chosen) for letter in sorted(set(chosen))},
        shown={letter: len(hits) / counted for letter, hits in sorted(right.items())},
        consistency=sum(same) / len(same) if same else None,
    )
