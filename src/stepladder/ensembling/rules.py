"""Ensemble rules: each is fitted on questions whose right letters are known, then names a letter for others.

Letters are numbers from 0; -1 is an answer that could not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepladder.records import LETTERS, Prediction

Letters = NDArray[np.int64]
"""One letter a question, shape (questions,)."""

RIDGE_PENALTY = 1.0
"""Of the selector's weights: with few questions they stay near 0."""


class Ballot(NamedTuple):
    """What members answered to the same questions."""

    members: tuple[str, ...]
    answers: NDArray[np.int64]
    """Each member's one answer, shape (members, questions)."""
    shares: NDArray[np.float64]
    """Each member's probability of each letter, or the letter's share of its samples; shape (members, questions,
    letters). Unreadable samples are missing from the sum."""

    def take(self, questions: NDArray[np.int64]) -> Ballot:
        """The ballot on the questions at these indices."""
        return Ballot(self.members, self.answers[:, questions], self.shares[:, questions])

    @property
    def graded(self) -> bool:
        """Whether any member spreads its probability or its samples over more than one letter."""
        return bool(((self.shares > 0) & (self.shares < 1)).any())


def ballot(
    members: Sequence[str],
    votes: Sequence[Sequence[Sequence[str | None]]],
    letters: str,
    likely: Sequence[Sequence[Mapping[str, float]]] = (),
) -> Ballot:
    """A ballot from letters. ``votes[m][q]`` are one member's samples for one question, None where nothing could be
    read; the member's answer is its most frequent letter, of equals the one that came first. ``likely[m][q]`` are the
    letters' probabilities, which take precedence over the samples' shares."""
    index_of = {letter: index for index, letter in enumerate(letters)}
    answers = np.full((len(members), len(votes[0])), -1, dtype=np.int64)
    shares = np.zeros((len(members), len(votes[0]), len(letters)))
    for member, by_question in enumerate(votes):
        for question, samples in enumerate(by_question):
            read = [index_of[letter] for letter in samples if letter is not None]
            if read:
                answers[member, question] = max(read, key=lambda index: (read.count(index), -read.index(index)))
            probabilities = likely[member][question] if likely else {}
            for letter, probability in probabilities.items():
                shares[member, question, index_of[letter]] = probability
            for index in read if not probabilities else ():
                shares[member, question, index] += 1 / len(samples)
    return Ballot(tuple(members), answers, shares)


def ballot_of(predictions: Mapping[str, Sequence[Prediction]]) -> Ballot:
    """The ballot of each member's predictions. Where none of a prediction's votes could be read, its answer, if it has
    one, counts as a vote."""
    votes = [[row.votes if any(row.votes) else (row.answer,) for row in rows] for rows in predictions.values()]
    return ballot(tuple(predictions), votes, LETTERS, [[row.likely for row in rows] for rows in predictions.values()])


FittedRule = Callable[[Ballot], Letters]
Rule = Callable[[Ballot, Letters], FittedRule]
"""Fits on a ballot and its right letters; the result answers other ballots of the same members."""


def leader(fitted_on: Ballot, right: Letters) -> int:
    """The member that is right most often; the first of equals."""
    return int((fitted_on.answers == right).sum(1).argmax())


def single(fitted_on: Ballot, right: Letters) -> FittedRule:
    """The best member alone."""
    best = leader(fitted_on, right)

    def apply(ballot_: Ballot) -> Letters:
        answers: Letters = ballot_.answers[best]
        return answers

    return apply


def vote(fitted_on: Ballot, right: Letters) -> FittedRule:
    """The most frequent letter; a tie goes to the best member's letter if it is among them, else to that of the better
    members."""
    order = np.argsort(-(fitted_on.answers == right).sum(1), kind="stable")
    tiebreak = np.empty(len(order))
    tiebreak[order] = 2.0 ** -np.arange(1, len(order) + 1) / 2
    return lambda ballot_: _highest(np.einsum("m,mql->ql", 1 + tiebreak / len(order), _one_hot(ballot_)))


def weighted(fitted_on: Ballot, right: Letters) -> FittedRule:
    """A vote weighted by each member's log-odds of being right (Nitzan and Paroush 1982); members worse than chance
    do not count."""
    odds = np.maximum(log_odds(fitted_on, right), 1e-9)
    return lambda ballot_: _highest(np.einsum("m,mql->ql", odds, _one_hot(ballot_)))


def follow(fitted_on: Ballot, right: Letters) -> FittedRule:
    """The winning entry's rule: the letter on which all other members agree, otherwise the best member's."""
    best = leader(fitted_on, right)

    def apply(ballot_: Ballot) -> Letters:
        others = np.delete(ballot_.answers, best, axis=0)
        own: Letters = ballot_.answers[best]
        if not len(others):
            return own
        agreed = (others == others[0]).all(0) & (others[0] >= 0)
        return _or_most_frequent(np.where(agreed, others[0], own), ballot_)

    return apply


def average(fitted_on: Ballot, right: Letters) -> FittedRule:
    """The letter with the highest mean probability over members; a tie goes to the best member's."""
    best = leader(fitted_on, right)
    return lambda ballot_: _highest(ballot_.shares.mean(0) + 1e-6 * _one_hot(ballot_)[best])


def selector(fitted_on: Ballot, right: Letters) -> FittedRule:
    """A conditional logit (McFadden 1974) over the letters that any member gave, from which members gave them and with
    what probability (:func:`_features`), with a ridge penalty."""
    from scipy.optimize import minimize  # takes a second, which 'stepladder status' does not wait for

    best, odds = leader(fitted_on, right), log_odds(fitted_on, right)
    features = _features(fitted_on, best, odds)
    candidates = _candidates(features)
    readable = np.flatnonzero(candidates[np.arange(len(right)), right])

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        score = np.where(candidates, features @ weights, -np.inf)[readable]
        score -= score.max(1, keepdims=True)
        chance = np.exp(score)
        chance /= chance.sum(1, keepdims=True)
        own = features[readable, right[readable]]
        fit = np.log(chance[np.arange(len(readable)), right[readable]] + 1e-300).sum()
        slope = (own - np.einsum("ql,qlf->qf", chance, features[readable])).sum(0)
        return RIDGE_PENALTY / 2 * float(weights @ weights) - float(fit), RIDGE_PENALTY * weights - slope

    fitted = minimize(loss, np.zeros(features.shape[-1]), jac=True, method="L-BFGS-B").x

    def apply(other: Ballot) -> Letters:
        features = _features(other, best, odds)
        candidates = _candidates(features)
        return np.where(candidates.any(1), np.where(candidates, features @ fitted, -np.inf).argmax(1), -1)

    return apply


RULES: dict[str, Rule] = {
    "single": single,
    "vote": vote,
    "weighted": weighted,
    "leader": follow,
    "average": average,
    "selector": selector,
}
"""By name, simplest first."""


def log_odds(fitted_on: Ballot, right: Letters) -> NDArray[np.float64]:
    """Each member's log-odds of being right, with one right and one wrong answer added; shape (members,)."""
    hits = (fitted_on.answers == right).sum(1)
    odds: NDArray[np.float64] = np.log((hits + 1) / (len(right) - hits + 1))
    return odds


def _features(ballot_: Ballot, best: int, odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Evidence for each letter of each question, shape (questions, letters, 5): whether the best member gives it, the
    share of the others that do, whether all others do, its mean probability over members, and the summed log-odds of
    the members that give it."""
    named = _one_hot(ballot_)
    others = np.delete(named, best, axis=0)
    share = others.mean(0) if len(others) else np.zeros_like(named[0])
    support = np.einsum("m,mql->ql", odds, named)
    return np.stack([named[best], share, share == 1, ballot_.shares.mean(0), support], axis=-1)


def _candidates(features: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which letters any member gave, shape (questions, letters)."""
    named: NDArray[np.bool_] = np.abs(features).sum(-1) > 0
    return named


def _one_hot(ballot_: Ballot) -> NDArray[np.float64]:
    """Answers one-hot: 1 where a member's answer is the letter, shape (members, questions, letters)."""
    same: NDArray[np.bool_] = ballot_.answers[:, :, None] == np.arange(ballot_.shares.shape[-1])
    return same.astype(np.float64)


def _highest(score: NDArray[np.float64]) -> Letters:
    """The letter with the highest score; -1 where no score is above 0."""
    return np.where(score.max(1) > 0, score.argmax(1), -1)


def _or_most_frequent(chosen: Letters, ballot_: Ballot) -> Letters:
    """The letters as chosen; where one is -1, the most frequent letter."""
    return np.where(chosen < 0, _highest(_one_hot(ballot_).sum(0)), chosen)
