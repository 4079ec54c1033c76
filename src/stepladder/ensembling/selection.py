"""Choice of an ensemble rule: nested cross-validation, grouped by problem, with the best single model as baseline.

The score of the best of several rules is biased upwards on the questions that it was chosen on. So the choice is
repeated inside every outer fold, on the questions of the other folds alone (Varma and Simon 2006), and the score
reported is that on questions which neither the choice nor the fit has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepladder.documents import CrossValidation, RuleScore
from stepladder.ensembling.rules import RULES, Ballot, Letters, leader
from stepladder.stats import Interval, accuracy_interval, sign_test

OUTER_FOLDS, INNER_FOLDS = 10, 5
MIN_STANDARD_ERRORS = 1.0
"""By which a rule must beat the best single model, since an ensemble costs its number of members times the compute."""
MAX_LUCK = 0.16
"""The p-value of one standard error, one-sided."""


class Scored(NamedTuple):
    """Score of a rule, or of the choice among them, on questions it was not fitted on."""

    accuracy: float
    interval: Interval
    right: tuple[bool, ...]
    """Whether each question was answered rightly."""

    def document(self) -> RuleScore:
        return RuleScore(accuracy=self.accuracy, low=self.interval.low, high=self.interval.high)


class Selection(NamedTuple):
    """The result of cross-validation."""

    rules: dict[str, Scored]
    """Each rule by itself."""
    chosen: Scored
    """The whole procedure: choose a rule, then use it."""
    choice: str
    """The rule to use, chosen from all questions."""
    leader: str
    """The best member on all questions."""
    oracle: float
    """Share of the questions that at least one member answers rightly: no rule can do better."""
    correlation: dict[tuple[str, str], float | None]
    """Pearson correlation of the errors of each pair of members; None where one of them is never or always wrong."""

    def document(self) -> CrossValidation:
        """As it is written to a file: without the answers to single questions."""
        return CrossValidation(
            rules={name: scored.document() for name, scored in self.rules.items()},
            chosen=self.chosen.document(),
            choice=self.choice,
            leader=self.leader,
            oracle=self.oracle,
            correlation=tuple((*pair, value) for pair, value in self.correlation.items()),
        )


def select(ballot: Ballot, right: Letters, problems: Sequence[str], seed: int) -> Selection:
    """Cross-validate every rule and the choice among them.

    Args:
        ballot: what the members answered.
        right: the right letters, shape (questions,).
        problems: which problem each question belongs to; a problem is never on both sides of a fold.
        seed: of the folds.

    Raises:
        ValueError: fewer than two problems.
    """
    groups = np.unique(np.asarray(problems), return_inverse=True)[1]
    outer = folds(groups, OUTER_FOLDS, seed)
    names = rules(ballot)
    answers = {name: np.full(len(right), -1, dtype=np.int64) for name in names}
    chosen = np.full(len(right), -1, dtype=np.int64)
    for held in outer:
        rest = np.setdiff1d(np.arange(len(right)), held)
        training, training_right, held_out = ballot.take(rest), right[rest], ballot.take(held)
        for name in names:
            answers[name][held] = RULES[name](training, training_right)(held_out)
        choice = choose(training, training_right, groups[rest], seed)
        chosen[held] = answers[choice][held]
    wrong = ballot.answers != right
    return Selection(
        rules={name: _scored(letters, right, problems, seed) for name, letters in answers.items()},
        chosen=_scored(chosen, right, problems, seed),
        choice=choose(ballot, right, groups, seed),
        leader=ballot.members[leader(ballot, right)],
        oracle=float((~wrong).any(0).mean()),
        correlation=_correlation(ballot.members, wrong),
    )


def rules(ballot: Ballot) -> tuple[str, ...]:
    """The rules that apply to a ballot: ``average`` only where it is graded, ``single`` alone for one member."""
    if len(ballot.members) == 1:
        return ("single",)
    return tuple(name for name in RULES if name != "average" or ballot.graded)


def choose(ballot: Ballot, right: Letters, groups: NDArray[np.int64], seed: int) -> str:
    """The rule that does best in cross-validation, if it beats the best member alone by :data:`MIN_STANDARD_ERRORS`
    standard errors of their difference (over problems); else ``single``. Of equals, the simplest."""
    names = rules(ballot)
    hits = {name: np.zeros(len(right)) for name in names}
    if len(np.unique(groups)) > 1:
        for held in folds(groups, INNER_FOLDS, seed):
            rest = np.setdiff1d(np.arange(len(right)), held)
            training, training_right, held_out = ballot.take(rest), right[rest], ballot.take(held)
            for name in names:
                hits[name][held] = RULES[name](training, training_right)(held_out) == right[held]
    best = max(names, key=lambda name: hits[name].sum())
    return best if _beats(hits[best] - hits["single"], groups) else "single"


def _beats(gains: NDArray[np.float64], groups: NDArray[np.int64]) -> bool:
    """Whether the sum of gains exceeds :data:`MIN_STANDARD_ERRORS`, taking problems as independent, and more problems
    were won than lost by more than the same luck. The sign test counts where a standard error says little: with one
    problem won and none lost it equals the gain."""
    by_problem = np.bincount(groups, weights=gains)
    won, lost = int((by_problem > 0).sum()), int((by_problem < 0).sum())
    return bool(gains.sum() > MIN_STANDARD_ERRORS * np.sqrt((by_problem**2).sum()) and sign_test(won, lost) <= MAX_LUCK)


def folds(groups: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Indices of the questions in each fold; problems are dealt out evenly and none is in two folds.

    Raises:
        ValueError: fewer than two problems.
    """
    problems = np.unique(groups)
    if len(problems) < 2:
        raise ValueError("cross-validation needs at least two problems")
    shuffled = np.random.default_rng(seed).permutation(problems)
    parts = [shuffled[index::count] for index in range(min(count, len(problems)))]
    return [np.flatnonzero(np.isin(groups, part)) for part in parts]


def _scored(answers: Letters, right: Letters, problems: Sequence[str], seed: int) -> Scored:
    hits = [bool(hit) for hit in answers == right]
    return Scored(sum(hits) / len(hits), accuracy_interval(hits, problems, seed), tuple(hits))


def _correlation(members: Sequence[str], wrong: NDArray[np.bool_]) -> dict[tuple[str, str], float | None]:
    correlation: dict[tuple[str, str], float | None] = {}
    for i, first in enumerate(members):
        for j, second in enumerate(members[i + 1 :], i + 1):
            varied = wrong[i].any() and wrong[j].any() and not wrong[i].all() and not wrong[j].all()
            correlation[first, second] = float(np.corrcoef(wrong[i], wrong[j])[0, 1]) if varied else None
    return correlation
