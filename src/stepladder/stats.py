"""The statistics behind every claim of the report: pure functions of answers, nothing else.

Sub-questions of one problem stand or fall together, so intervals resample problems, not questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """Confidence limits of an accuracy, shares in [0, 1]."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Two systems on the same questions: how often only one of them was right."""

    lost: int
    """Right before, wrong after (the table's b)."""
    won: int
    """Wrong before, right after (the table's c)."""
    p: float
    """Two-sided exact p-value of "a change is as likely to help as to hurt"."""


def accuracy_interval(right: Sequence[bool], problems: Sequence[str], seed: int) -> Interval:
    """95 % interval of an accuracy by the cluster bootstrap (Davison & Hinkley 1997, section 3.8; percentile limits).

    ``right[i]`` says whether question i was answered rightly, ``problems[i]`` which problem it belongs to. Each
    resample draws as many problems as there are, with replacement, each with all its questions. The order of the
    questions does not matter.

    When every problem has the same accuracy (all right, all wrong, a single problem) each resample equals the
    sample and the bootstrap would claim certainty; then the limits are Clopper-Pearson's with the problem as the
    trial, because the data say nothing on how far questions of one problem differ.

    Raises:
        ValueError: no question, or the two sequences differ in length.
    """
    if not right:
        raise ValueError("an accuracy needs at least one question")
    tally: dict[str, list[int]] = {}
    for hit, problem in zip(right, problems, strict=True):
        entry = tally.setdefault(problem, [0, 0])
        entry[0] += hit
        entry[1] += 1
    # Problems with the same (right, questions) are interchangeable, so drawing problems is drawing how often each
    # such kind occurs: one multinomial a resample, over a handful of kinds however many problems there are.
    kinds, counts = np.unique(np.array(list(tally.values())), axis=0, return_counts=True)
    hits, sizes = kinds[:, 0], kinds[:, 1]  # both [kinds]
    if np.all(hits * sizes[0] == hits[0] * sizes):
        return _clopper_pearson(float(hits[0] / sizes[0]), len(tally))
    drawn = np.random.default_rng(seed).multinomial(len(tally), counts / len(tally), size=RESAMPLES)
    accuracies = (drawn @ hits) / (drawn @ sizes)  # [RESAMPLES]
    low, high = np.quantile(accuracies, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def _clopper_pearson(share: float, trials: int) -> Interval:
    """Clopper-Pearson limits from the quantiles of the beta distribution; ``share * trials`` need not be whole."""
    from scipy.stats import beta  # SciPy takes a second to import, which 'stepladder status' does not wait for

    tail, hits = (1 - CONFIDENCE) / 2, share * trials
    low = 0.0 if share == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if share == 1 else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return Interval(low, high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two systems on the same questions: a sign test of the questions they disagree on.

    It takes questions as independent; those of one problem are not quite, which makes p somewhat too small.

    Raises:
        ValueError: the two sequences differ in length.
    """
    from scipy.stats import binomtest

    pairs = list(zip(before, after, strict=True))
    lost = sum(old and not new for old, new in pairs)
    won = sum(new and not old for old, new in pairs)
    p = float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
    return McNemar(lost, won, p)


def sign_test(won: int, lost: int) -> float:
    """One-sided exact p-value of winning at least so many of ``won + lost`` fair coin tosses; 1 where there is none."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, alternative="greater").pvalue) if won + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for looking at several tests at once (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        # The floor keeps the order of the raw values: a larger p never ends below a smaller one.
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
