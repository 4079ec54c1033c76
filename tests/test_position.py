"""Position bias, on answers whose bias is known."""

from __future__ import annotations

from itertools import permutations

from stepladder.documents import PositionBias
from stepladder.mcq.position import Positions
from stepladder.mcq.shuffle import to_original
from stepladder.records import Question, Sample


def question(name: str, answer: str) -> Question:
    return Question(
        id=name, problem_id=name, problem="P.", question="?", options=("x", "y", "z"), answer=answer, language="en",
        source="s",
    )  # fmt: skip


QUESTIONS = {name: question(name, answer) for name, answer in (("q1", "A"), ("q2", "B"), ("q3", "C"))}
ORDERS = list(permutations(range(3)))


def sample(name: str, order: tuple[int, ...], answer: str | None) -> Sample:
    return Sample(
        question_id=name, rung="r", model="m", sample_index=0, permutation=order, key="k", text="", answer=answer,
        verdict="accepted" if answer == QUESTIONS[name].answer else "wrong",
    )  # fmt: skip


def bias_of(samples: list[Sample]) -> PositionBias:
    positions = Positions()
    for asked in QUESTIONS.values():
        positions.add(asked, [sample for sample in samples if sample.question_id == asked.id])
    return positions.bias("model")


def test_a_model_that_always_names_the_first_letter() -> None:
    samples = [sample(name, order, to_original("A", order)) for name in QUESTIONS for order in ORDERS]
    bias = bias_of(samples)
    assert bias.recall == {"A": 1.0, "B": 0.0, "C": 0.0}
    assert bias.chosen == {"A": 1.0}
    assert bias.shown == {"A": 1 / 3, "B": 1 / 3, "C": 1 / 3}
    assert bias.consistency == 0.2  # three pairs of six orders share their first option, of fifteen


def test_a_model_that_answers_what_is_asked() -> None:
    samples = [sample(name, order, QUESTIONS[name].answer) for name in QUESTIONS for order in ORDERS]
    bias = bias_of(samples)
    assert bias.recall == {"A": 1.0, "B": 1.0, "C": 1.0}
    assert bias.consistency == 1.0


def test_unreadable_answers_are_not_right_and_name_nothing() -> None:
    mute = bias_of([sample("q1", ORDERS[0], None), sample("q1", ORDERS[0], "A")])
    assert (mute.model, mute.answers, mute.recall, mute.consistency) == ("model", 2, {"A": 0.5}, None)
    once = bias_of([sample("q2", ORDERS[0], "B")])
    assert (once.recall, once.chosen) == ({"B": 1.0}, {"B": 1.0})
    assert bias_of([]) == PositionBias(model="model", answers=0, recall={}, chosen={}, shown={}, consistency=None)
