"""The statistics of the report, as pure functions of answers.

Answers to questions about the same problem are correlated, so intervals resample problems, not questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_normal_quantile = NormalDist().inv_cdf


class Interval(NamedTuple):
    """Confidence limits of an accuracy, in [0, 1], or of a gain in accuracy, in [-1, 1]."""

    low: float
    high: float


class McNemar(NamedTuple):
    """The McNemar test of two systems on the same questions."""

    lost: int
    """Questions that only the first system answered correctly (b of the 2x2 table)."""
    won: int
    """Questions that only the second system answered correctly (c of the 2x2 table)."""
    p: float
    """Two-sided exact p-value; the null hypothesis is that both kinds are equally likely."""


def accuracy_interval(right: Sequence[bool], problems: Sequence[str], seed: int) -> Interval:
    """95 % interval of an accuracy by the cluster bootstrap (Davison & Hinkley 1997, section 3.8; percentile limits).

    ``right[i]`` says whether question i was answered correctly, ``problems[i]`` which problem it belongs to. Each
    resample draws as many problems as there are, with replacement, each with all its questions. The order of the
    questions does not matter.

    If every problem has the same accuracy (all right, all wrong, a single problem), all resamples are equal and the
    bootstrap interval would have width 0. Then the limits are Clopper-Pearson's with the problem as the trial, because
    the data do not show how much questions of one problem differ.

    Raises:
        ValueError: there is no question, or the sequences differ in length.
    """
    if not right:
        raise ValueError("an accuracy needs at least one question")
    tallies = _tallies(right, problems)
    hits, sizes = tallies.T
    if np.all(hits * sizes[0] == hits[0] * sizes):
        return _clopper_pearson(float(hits[0] / sizes[0]), len(tallies))
    return _resampled_mean(tallies, seed)


def gain_interval(before: Sequence[bool], after: Sequence[bool], problems: Sequence[str], seed: int) -> Interval:
    """95 % interval of the accuracy that a second system has above a first on the same questions, in [-1, 1], by the
    bootstrap of :func:`accuracy_interval`.

    Raises:
        ValueError: there is no question, or the sequences differ in length.
    """
    if not before:
        raise ValueError("a gain needs at least one question")
    gains = [second - first for first, second in zip(before, after, strict=True)]
    return _resampled_mean(_tallies(gains, problems), seed)


def _tallies(values: Sequence[int], problems: Sequence[str]) -> np.ndarray:
    """A row for each problem, shape [problems, 2]: the sum of the values of its questions, and their number."""
    tally: dict[str, list[int]] = {}
    for value, problem in zip(values, problems, strict=True):
        entry = tally.setdefault(problem, [0, 0])
        entry[0] += value
        entry[1] += 1
    return np.array(list(tally.values()))


def _resampled_mean(tallies: np.ndarray, seed: int) -> Interval:
    """Percentile limits of a mean when problems are drawn anew."""
    # Problems with the same tally are interchangeable, so a resample only has to draw how often each such kind occurs:
    # from one multinomial distribution over the few kinds there are.
    kinds, counts = np.unique(tallies, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(tallies), counts / len(tallies), size=RESAMPLES)
    means = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])  # [RESAMPLES]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def _clopper_pearson(share: float, trials: int) -> Interval:
    """Clopper-Pearson limits from the quantiles of the beta distribution; ``share * trials`` need not be whole."""
    from scipy.stats import beta  # SciPy takes a second to import; 'stepladder status' does without it

    tail, hits = (1 - CONFIDENCE) / 2, share * trials
    low = 0.0 if share == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if share == 1 else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return Interval(low, high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two systems on the same questions: a sign test over the questions that only one got right.

    It assumes independent questions. Those about the same problem are not quite, so p is somewhat too small.

    Raises:
        ValueError: the sequences differ in length.
    """
    from scipy.stats import binomtest

    pairs = list(zip(before, after, strict=True))
    lost = sum(first and not second for first, second in pairs)
    won = sum(second and not first for first, second in pairs)
    p = float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
    return McNemar(lost, won, p)


class PairedCounts(NamedTuple):
    """What changed between two systems over paired answers. The numbers may be fractions: :func:`effective` divides
    them by the design effect."""

    lost: float
    """Answers that only the first system gave rightly."""
    won: float
    """Answers that only the second system gave rightly."""
    n: float
    """All pairs."""

    @property
    def loss(self) -> float:
        """Accuracy lost, share."""
        return (self.lost - self.won) / self.n


def design_effect(changes: Mapping[str, Sequence[int]]) -> float:
    """By how much the variance of a mean change is larger than if all answers were independent, at least 1: the ratio
    of its cluster-robust and its plain variance (Rao & Scott 1992, Biometrics 48:577).

    Args:
        changes: by problem, one number for each of its answers: 1 lost, -1 won, 0 unchanged.
    """
    every = np.concatenate([np.asarray(group, dtype=float) for group in changes.values()])
    plain = float(((every - every.mean()) ** 2).sum())
    if plain == 0 or len(changes) < 2:
        return 1.0
    sums = [sum(group) - len(group) * every.mean() for group in changes.values()]
    return max(1.0, float(np.square(sums).sum()) * len(changes) / (len(changes) - 1) / plain)


def effective(counts: PairedCounts, design: float) -> PairedCounts:
    """The counts that as many independent answers as these are worth would have."""
    return PairedCounts(*(count / design for count in counts))


def sign_flip_test(sums: Sequence[int]) -> float:
    """One-sided exact p-value of a total at least as high, if each problem's sum could as well have had the other sign
    (Fisher's randomisation test). It holds however much the answers about one problem hang together."""
    sizes = [abs(each) for each in sums if each]
    chances = np.ones(1)  # of each total of the positive ones
    for size in sizes:
        chances = 0.5 * (np.pad(chances, (0, size)) + np.pad(chances, (size, 0)))
    return min(1.0, float(chances[(sum(sums) + sum(sizes)) // 2 :].sum()))


def excludes_loss(counts: PairedCounts, margin: float, level: float) -> bool:
    """Whether a loss of ``margin`` or more is excluded at one-sided ``level``: Tango's score test of non-inferiority
    for paired proportions (Tango 1998, Stat Med 17:891; compared with others in Newcombe 1998, Stat Med 17:2635)."""
    return _score(counts, margin, level) < 0


def largest_loss(counts: PairedCounts, level: float) -> float:
    """The smallest margin that :func:`excludes_loss`: Tango's upper confidence limit of the loss."""
    from scipy.optimize import brentq

    low = counts.loss + 1e-9  # where nothing changed, a margin of exactly 0 has no variance
    return float(brentq(lambda margin: _score(counts, margin, level), low, 1.0)) if low < 1 else 1.0


def _score(counts: PairedCounts, margin: float, level: float) -> float:
    """How far the loss is above the margin plus what chance explains at ``level``, in answers."""
    spread = math.sqrt(counts.n * _variance(counts, margin))
    return counts.lost - counts.won - counts.n * margin + _normal_quantile(1 - level) * spread


def _variance(counts: PairedCounts, margin: float) -> float:
    """Of one answer's change, if the loss were ``margin``: with the maximum-likelihood share of answers won under that
    constraint (Tango 1998, equation 6)."""
    lost, won = counts.lost / counts.n, counts.won / counts.n
    b = (2 - lost + won) * margin - lost - won
    c = -won * margin * (1 - margin)
    return max(0.0, (math.sqrt(b * b - 8 * c) - b) / 2 + margin * (1 - margin))


def answers_needed(changed: float, margin: float, level: float, power: float) -> int:
    """Independent pairs of answers with which a loss of ``margin`` is excluded with probability ``power`` where nothing
    is lost, and a loss of ``margin`` is shown to be one with about the same (Nam 1997, Biometrics 53:1422).

    Args:
        changed: share of the answers that change sides.
        margin: the loss to exclude, above 0.
        level: one-sided.
        power: probability.
    """
    variance = _variance(PairedCounts(changed / 2, changed / 2, 1), margin)
    reach = _normal_quantile(1 - level) * math.sqrt(variance) + _normal_quantile(power) * math.sqrt(changed)
    return math.ceil((reach / margin) ** 2)


def sign_test(won: int, lost: int) -> float:
    """One-sided exact p-value of winning at least so many of ``won + lost`` fair coin tosses; 1 where there is none."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, alternative="greater").pvalue) if won + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple tests (Holm 1979), in the order of ``p_values``."""
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        # The floor keeps the order of the raw values: a larger p never ends below a smaller one.
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
