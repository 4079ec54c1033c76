"""Statistics against values worked out by hand or known from textbooks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.stats import accuracy_interval, gain_interval, holm, mcnemar


def test_interval_of_independent_questions_is_close_to_the_normal_one() -> None:
    right = [True] * 120 + [False] * 80
    low, high = accuracy_interval(right, [str(i) for i in range(200)], seed=1)
    # 0.6 +- 1.96 * sqrt(0.6 * 0.4 / 200)
    assert low == pytest.approx(0.6 - 0.0679, abs=0.006)
    assert high == pytest.approx(0.6 + 0.0679, abs=0.006)


def test_interval_is_wider_when_questions_of_a_problem_stand_or_fall_together() -> None:
    right = [problem < 30 for problem in range(50) for _ in range(4)]
    together = accuracy_interval(right, [str(problem) for problem in range(50) for _ in range(4)], seed=1)
    alone = accuracy_interval(right, [str(i) for i in range(200)], seed=1)
    # Four equal answers are worth one, so the interval must double: sqrt(4).
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.1)


def test_interval_does_not_depend_on_the_order_of_the_questions() -> None:
    rows = [(i % 3 == 0, f"p{i // 4}") for i in range(60)]
    forward = accuracy_interval([right for right, _ in rows], [problem for _, problem in rows], seed=3)
    rows.reverse()
    assert accuracy_interval([right for right, _ in rows], [problem for _, problem in rows], seed=3) == forward


def test_interval_of_a_gain_pairs_the_answers_and_resamples_problems() -> None:
    before = [i % 2 == 0 for i in range(200)]
    after = [hit or i % 10 == 1 for i, hit in enumerate(before)]  # 20 won, none lost
    alone = gain_interval(before, after, [str(i) for i in range(200)], seed=1)
    spread = 1.96 * (0.1 * 0.9 / 200) ** 0.5  # of a share of 0.1; unpaired it would be 0.098
    assert alone == pytest.approx((0.1 - spread, 0.1 + spread), abs=0.006)
    four = [value for value in before for _ in range(4)], [value for value in after for _ in range(4)]
    together = gain_interval(*four, [str(i // 4) for i in range(800)], seed=1)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)  # no narrower for copies
    assert gain_interval(after, before, [str(i) for i in range(200)], seed=1).high < 0
    with pytest.raises(ValueError, match="at least one question"):
        gain_interval([], [], [], seed=1)


def test_interval_of_all_right_is_clopper_pearson_over_problems() -> None:
    low, high = accuracy_interval([True] * 20, [str(i // 2) for i in range(20)], seed=1)
    assert high == 1
    # n of n right: the lower limit is (alpha / 2) ** (1 / n), here with the 10 problems as trials.
    assert low == pytest.approx(0.025 ** (1 / 10))


def test_interval_of_all_wrong_mirrors_all_right() -> None:
    low, high = accuracy_interval([False] * 10, [str(i) for i in range(10)], seed=1)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_interval_of_problems_that_are_all_half_right_is_not_a_point() -> None:
    low, high = accuracy_interval([True, False] * 10, [str(i // 2) for i in range(20)], seed=1)
    # Clopper-Pearson for 5 of 10, from the usual tables.
    assert [low, high] == pytest.approx([0.1871, 0.8129], abs=1e-4)


def test_interval_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accuracy_interval([], [], seed=1)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdefgh")), min_size=1, max_size=60))
def test_interval_holds_the_accuracy_and_stays_a_share(rows: list[tuple[bool, str]]) -> None:
    right = [hit for hit, _ in rows]
    low, high = accuracy_interval(right, [problem for _, problem in rows], seed=1)
    assert 0 <= low <= high <= 1
    assert low - 1e-9 <= sum(right) / len(right) <= high + 1e-9


def test_mcnemar_counts_and_exact_p() -> None:
    before = [True] * 1 + [False] * 6 + [True] * 40
    after = [False] * 1 + [True] * 6 + [True] * 40
    test = mcnemar(before, after)
    assert (test.lost, test.won) == (1, 6)
    assert test.p == pytest.approx(2 * (1 + 7) / 2**7)  # both tails of a fair coin: 0 or 1 of 7


def test_mcnemar_of_equal_systems_proves_nothing() -> None:
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)


def test_mcnemar_refuses_different_questions() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def test_holm_known_values() -> None:
    # 0.01 * 4, 0.02 * 3, then 0.03 * 2, and 0.04 lifted to the value before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_never_exceeds_one_and_takes_none() -> None:
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(raw <= new <= min(1, len(p_values) * raw) for raw, new in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [new for _, new in pairs] == sorted(adjusted)
