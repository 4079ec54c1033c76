"""Which rule to trust: nested cross-validation, grouped by problem, with one model as the answer to beat.

Choosing the best of several rules and then quoting its score on the same questions flatters it. So the choice is made
again inside every outer fold, from that fold's other questions alone (Varma and Simon 2006), and what is quoted is the
score on questions that neither the choice nor the fit has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepladder.documents import CrossValidation, RuleScore
from stepladder.ensembling.rules import RULES, Ballot, Letters, leader
from stepladder.stats import Interval, accuracy_interval

OUTER, INNER = 10, 5
"""Folds."""
ERRORS = 1.0
"""Standard errors by which a rule must beat one model, since it costs as many times the compute as it has members."""


class Scored(NamedTuple):
    """How a way to answer does on questions it was not fitted on."""

    accuracy: float
    interval: Interval
    right: tuple[bool, ...]
    """By question."""

    def document(self) -> RuleScore:
        return RuleScore(accuracy=self.accuracy, low=self.interval.low, high=self.interval.high)


class Selection(NamedTuple):
    """What cross-validation found."""

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
    """How alike the members of a pair err: Pearson correlation of being wrong. None where one never or always is."""

    def document(self) -> CrossValidation:
        """The same as it is written down: without the answers of single questions."""
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
    outer = folds(groups, OUTER, seed)
    names = rules(ballot)
    answers = {name: np.full(len(right), -1, dtype=np.int64) for name in names}
    chosen = np.full(len(right), -1, dtype=np.int64)
    for held in outer:
        rest = np.setdiff1d(np.arange(len(right)), held)
        known, truth, held_out = ballot.take(rest), right[rest], ballot.take(held)
        for name in names:
            answers[name][held] = RULES[name](known, truth)(held_out)
        choice = choose(known, truth, groups[rest], seed)
        chosen[held] = answers[choice][held]
    wrong = ballot.answers != right
    return Selection(
        rules={name: _scored(found, right, problems, seed) for name, found in answers.items()},
        chosen=_scored(chosen, right, problems, seed),
        choice=choose(ballot, right, groups, seed),
        leader=ballot.members[leader(ballot, right)],
        oracle=float((~wrong).any(0).mean()),
        correlation=_correlation(ballot.members, wrong),
    )


def rules(ballot: Ballot) -> tuple[str, ...]:
    """The rules that can answer a ballot: probabilities are averaged only where there are some."""
    if len(ballot.members) == 1:
        return ("single",)
    return tuple(name for name in RULES if name != "average" or ballot.graded)


def choose(ballot: Ballot, right: Letters, groups: NDArray[np.int64], seed: int) -> str:
    """The rule that does best in cross-validation, if it beats the best member alone by :data:`ERRORS` standard errors
    of their difference (over problems); else ``single``. Of equals the simplest."""
    names = rules(ballot)
    hits = {name: np.zeros(len(right)) for name in names}
    if len(np.unique(groups)) > 1:
        for held in folds(groups, INNER, seed):
            rest = np.setdiff1d(np.arange(len(right)), held)
            known, truth, held_out = ballot.take(rest), right[rest], ballot.take(held)
            for name in names:
                hits[name][held] = RULES[name](known, truth)(held_out) == right[held]
    best = max(names, key=lambda name: hits[name].sum())
    return best if _beats(hits[best] - hits["single"], groups) else "single"


def _beats(gains: NDArray[np.float64], groups: NDArray[np.int64]) -> bool:
    """Whether the sum of gains exceeds its standard error, problems being independent of each other."""
    by_problem = np.bincount(groups, weights=gains)
    return bool(gains.sum() > ERRORS * np.sqrt((by_problem**2).sum()))


def folds(groups: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Questions by fold, as many problems in each as can be.

    Raises:
        ValueError: fewer than two problems.
    """
    problems = np.unique(groups)
    if len(problems) < 2:
        raise ValueError("cross-validation needs at least two problems")
    dealt = np.random.default_rng(seed).permutation(problems)
    parts = [dealt[index::count] for index in range(min(count, len(problems)))]
    return [np.flatnonzero(np.isin(groups, part)) for part in parts]


def _scored(answers: Letters, right: Letters, problems: Sequence[str], seed: int) -> Scored:
    hits = [bool(hit) for hit in answers == right]
    return Scored(sum(hits) / len(hits), accuracy_interval(hits, problems, seed), tuple(hits))


def _correlation(members: Sequence[str], wrong: NDArray[np.bool_]) -> dict[tuple[str, str], float | None]:
    found: dict[tuple[str, str], float | None] = {}
    for i, first in enumerate(members):
        for j, second in enumerate(members[i + 1 :], i + 1):
            varied = wrong[i].any() and wrong[j].any() and not wrong[i].all() and not wrong[j].all()
            found[first, second] = float(np.corrcoef(wrong[i], wrong[j])[0, 1]) if varied else None
    return found
