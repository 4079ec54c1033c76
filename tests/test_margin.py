"""Whether quantising lost accuracy: statistics, decision, and how often it is right on exports of known loss."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from made import QUESTION
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from test_docs import script

from stepladder import stats
from stepladder.quantising.margin import Outcomes, check_accuracy, decide, further_questions, sentence
from stepladder.records import Question
from stepladder.stats import PairedCounts, design_effect, effective, excludes_loss, largest_loss, sign_flip_test

simulated = script("gate", "benchmarks")


def outcomes(lost: int, won: int, n: int) -> Outcomes:
    """Answers to questions about as many problems."""
    before = (True,) * lost + (False,) * won + (True,) * (n - lost - won)
    after = (False,) * lost + (True,) * won + (True,) * (n - lost - won)
    return Outcomes(tuple(f"p{number}" for number in range(n)), before, after)


@pytest.mark.parametrize(("lost", "won", "margin"), [(12, 2, 0.1), (0, 3, 0.02), (5, 0, 0.3), (0, 0, 0.03)])
def test_the_variance_is_that_of_the_likeliest_shares_under_the_margin(lost: int, won: int, margin: float) -> None:
    n = 50

    def unlikelihood(share_won: float) -> float:
        shares = (share_won + margin, share_won, 1 - margin - 2 * share_won)
        return -sum(k * math.log(p) for k, p in zip((lost, won, n - lost - won), shares, strict=True) if k)

    likeliest = minimize_scalar(unlikelihood, bounds=(1e-9, (1 - margin) / 2 - 1e-9), method="bounded").x
    wanted = 2 * likeliest + margin - margin**2
    assert stats._variance(PairedCounts(lost, won, n), margin) == pytest.approx(wanted, abs=1e-4)


def test_the_largest_loss_is_where_exclusion_begins() -> None:
    for counts in (PairedCounts(12, 2, 50), PairedCounts(0, 0, 210), PairedCounts(3.5, 6.25, 99.5)):
        limit = largest_loss(counts, 0.025)
        assert not excludes_loss(counts, limit - 1e-6, 0.025)
        assert excludes_loss(counts, limit + 1e-6, 0.025)
    assert largest_loss(PairedCounts(4, 0, 4), 0.025) == 1.0
    assert largest_loss(PairedCounts(0, 0, 210), 0.025) == pytest.approx(3.84 / (210 + 3.84), abs=1e-3)


def test_sign_flips_are_counted_exactly() -> None:
    assert sign_flip_test([1] * 25 + [-1] * 7) == pytest.approx(binomtest(25, 32, alternative="greater").pvalue)
    sums = [3, -1, 2, 2, -2, 1]
    totals = [
        sum(s * abs(x) for s, x in zip(signs, sums, strict=True)) for signs in itertools.product((1, -1), repeat=6)
    ]
    assert sign_flip_test(sums) == pytest.approx(np.mean([total >= sum(sums) for total in totals]))
    assert sign_flip_test([0, 0]) == 1.0
    assert sign_flip_test([-5]) == 1.0


def test_answers_that_say_the_same_count_once() -> None:
    changes = {f"p{number}": [1 if number < 4 else -1 if number < 6 else 0] for number in range(50)}
    assert design_effect(changes) == pytest.approx(50 / 49)
    eightfold = {problem: group * 8 for problem, group in changes.items()}
    assert design_effect(eightfold) == pytest.approx(8 * 50 / 49)
    assert effective(PairedCounts(32, 16, 400), 8) == PairedCounts(4, 2, 50)
    assert design_effect({"p": [1, 0], "q": [1, 0]}) == 1.0


def test_what_the_demo_measured_is_decided() -> None:
    """Flips on the 201 questions of the test (docs/guide/four-bits.md) and of the shipped export on 72, margin 0.1."""
    assert decide(outcomes(25, 7, 201), 0.1).decision == "worse", "rounding to nearest, p = 0.002"
    assert decide(outcomes(28, 9, 201), 0.1).decision == "worse", "symmetric rounding"
    assert decide(outcomes(4, 4, 201), 0.1).decision == "lossless enough"
    assert decide(outcomes(1, 0, 72), 0.1).decision == "lossless enough"
    assert decide(outcomes(72, 0, 72), 1.0).decision == "lossless enough", "no gate"


def test_a_lost_question_or_three_of_210_do_not_fail_an_export() -> None:
    """Under max_loss = 0.01 they did, and of lossless exports with 6 % of flips one in five loses so many."""
    test = decide(outcomes(9, 5, 210), 0.01)
    assert test.decision == "cannot tell"
    assert test.needed is not None
    assert test.needed > 4000
    assert f"it takes about {test.needed - 210} more validation answers" in sentence(test, 8)


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_lossless_exports_pass_and_three_points_are_refused(shared: float) -> None:
    """The whole table: python benchmarks/gate.py."""
    lossless = simulated.decisions(simulated.Export(0.0, 0.06, shared), 0.03, 1, 80)
    assert lossless["worse"] <= 0.05
    assert lossless["lossless enough"] > 0.6
    worse = simulated.decisions(simulated.Export(0.03, 0.06, shared), 0.03, 1, 80)
    assert worse["worse"] >= 0.8 * (1 - worse["cannot tell"])
    assert worse["lossless enough"] <= 0.05


FOUR = QUESTION.model_copy(update={"options": ("a", "b", "c", "d"), "answer": "C"})
LAST = QUESTION.model_copy(update={"options": ("a", "b", "c", "none of the above"), "answer": "A"})
NAMED = QUESTION.model_copy(update={"question": "Is option A right?"})


def test_more_answers_are_other_orders_of_the_same_options() -> None:
    more = further_questions([QUESTION, FOUR, LAST, NAMED], None, 8, seed=1)
    assert len({question.options for question in more}) == len(more) == 1 + 7 + 5 + 0
    originals = {frozenset(question.options): question for question in (QUESTION, FOUR, LAST)}
    for question in more:
        original = originals[frozenset(question.options)]
        assert question.options != original.options
        right = [q.options["ABCD".index(str(q.answer))] for q in (original, question)]
        assert right[0] == right[1]
        assert (question.options[-1] == "none of the above") == (original is LAST)
    assert len(further_questions([QUESTION, FOUR], 3, 8, seed=1)) == 2, "every question once more, not one alone"
    assert further_questions([FOUR], None, 1, seed=1) == []
    assert more == further_questions([QUESTION, FOUR, LAST, NAMED], None, 8, seed=1)


def test_more_is_asked_only_where_it_decides() -> None:
    questions = [FOUR.model_copy(update={"id": f"q{n}", "problem_id": f"p{n}"}) for n in range(210)]
    asked: list[int] = []

    def ask(more: list[Question]) -> Outcomes:
        asked.append(len(more))
        return outcomes(0, 0, len(more))

    assert check_accuracy(outcomes(1, 1, 210), questions, 0.03, 8, 1, ask).decision == "lossless enough"
    assert check_accuracy(outcomes(20, 2, 210), questions, 0.03, 8, 1, ask).decision == "worse"
    assert asked == []
    test = check_accuracy(outcomes(8, 5, 210), questions, 0.03, 8, 1, ask)
    assert (test.decision, asked) == ("lossless enough", [420])
    assert (test.answers, test.lost, test.won) == (630, 8, 5)
