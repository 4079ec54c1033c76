"""The rules: each is fitted on questions whose answers are known, and then names a letter for others.

A letter is a number from 0; -1 is an answer that could not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepladder.records import LETTERS, Prediction

Letters = NDArray[np.int64]
"""One letter a question, shape (questions,)."""

PENALTY = 1.0
"""Ridge penalty of the selector's weights: pulls them to 0, where it knows nothing."""


class Ballot(NamedTuple):
    """What members answered to the same questions."""

    members: tuple[str, ...]
    answers: NDArray[np.int64]
    """Each member's one answer, shape (members, questions)."""
    shares: NDArray[np.float64]
    """How likely each member finds each letter: probabilities, or shares of its samples; shape (members, questions,
    letters). What could not be read is missing from the sum."""

    def take(self, questions: NDArray[np.int64]) -> Ballot:
        """The same for some questions, by their place."""
        return Ballot(self.members, self.answers[:, questions], self.shares[:, questions])

    @property
    def graded(self) -> bool:
        """Whether any member says more than one letter."""
        return bool(((self.shares > 0) & (self.shares < 1)).any())


def ballot(
    members: Sequence[str],
    votes: Sequence[Sequence[Sequence[str | None]]],
    letters: str,
    likely: Sequence[Sequence[Mapping[str, float]]] = (),
) -> Ballot:
    """A ballot from letters; ``votes[m][q]`` are one member's samples for one question, None where nothing could be
    read. A member's answer is its most frequent letter, of equals the one that came first. ``likely[m][q]`` are the
    letters' probabilities, which take precedence over the samples' shares."""
    place = {letter: index for index, letter in enumerate(letters)}
    answers = np.full((len(members), len(votes[0])), -1, dtype=np.int64)
    shares = np.zeros((len(members), len(votes[0]), len(letters)))
    for member, by_question in enumerate(votes):
        for question, samples in enumerate(by_question):
            read = [place[letter] for letter in samples if letter is not None]
            if read:
                answers[member, question] = max(read, key=lambda index: (read.count(index), -read.index(index)))
            chances = likely[member][question] if likely else {}
            for letter, chance in chances.items():
                shares[member, question, place[letter]] = chance
            for index in read if not chances else ():
                shares[member, question, index] += 1 / len(samples)
    return Ballot(tuple(members), answers, shares)


def ballot_of(given: Mapping[str, Sequence[Prediction]]) -> Ballot:
    """The ballot of members' predictions. One whose votes nobody could read counts with the answer that stands for
    them, if there is any."""
    votes = [[row.votes if any(row.votes) else (row.answer,) for row in rows] for rows in given.values()]
    return ballot(tuple(given), votes, LETTERS, [[row.likely for row in rows] for rows in given.values()])


Applied = Callable[[Ballot], Letters]
Rule = Callable[[Ballot, Letters], Applied]
"""Fitted on a ballot and its right letters, it answers other ballots of the same members."""


def leader(known: Ballot, right: Letters) -> int:
    """The member that is right most often; the first of equals."""
    return int((known.answers == right).sum(1).argmax())


def single(known: Ballot, right: Letters) -> Applied:
    """The best member alone."""
    best = leader(known, right)

    def apply(ballot_: Ballot) -> Letters:
        answers: Letters = ballot_.answers[best]
        return answers

    return apply


def vote(known: Ballot, right: Letters) -> Applied:
    """The most frequent letter; of equals the best member's if it is among them, else the one that better members
    gave."""
    order = np.argsort(-(known.answers == right).sum(1), kind="stable")
    tiebreak = np.empty(len(order))
    tiebreak[order] = 2.0 ** -np.arange(1, len(order) + 1) / 2
    return lambda ballot_: _most(np.einsum("m,mql->ql", 1 + tiebreak / len(order), _named(ballot_)))


def weighted(known: Ballot, right: Letters) -> Applied:
    """A vote weighted by each member's log-odds of being right (Nitzan and Paroush 1982); members worse than chance
    have no voice."""
    odds = np.maximum(log_odds(known, right), 1e-9)
    return lambda ballot_: _most(np.einsum("m,mql->ql", odds, _named(ballot_)))


def follow(known: Ballot, right: Letters) -> Applied:
    """The winning entry's rule: where all other members agree, their letter, otherwise the best member's."""
    best = leader(known, right)

    def apply(ballot_: Ballot) -> Letters:
        others = np.delete(ballot_.answers, best, axis=0)
        own: Letters = ballot_.answers[best]
        if not len(others):
            return own
        agreed = (others == others[0]).all(0) & (others[0] >= 0)
        return _or_any(np.where(agreed, others[0], own), ballot_)

    return apply


def average(known: Ballot, right: Letters) -> Applied:
    """The letter that members find likeliest on average; of equals the best member's."""
    best = leader(known, right)
    return lambda ballot_: _most(ballot_.shares.mean(0) + 1e-6 * _named(ballot_)[best])


def selector(known: Ballot, right: Letters) -> Applied:
    """The letter that its supporters make likeliest: a conditional logit (McFadden 1974) over the letters that anybody
    named, from who named them and how surely, with a ridge penalty."""
    from scipy.optimize import minimize  # takes a second, which 'stepladder status' does not wait for

    best, odds = leader(known, right), log_odds(known, right)
    features = _features(known, best, odds)
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
        return PENALTY / 2 * float(weights @ weights) - float(fit), PENALTY * weights - slope

    fitted = minimize(loss, np.zeros(features.shape[-1]), jac=True, method="L-BFGS-B").x

    def apply(other: Ballot) -> Letters:
        found = _features(other, best, odds)
        named = _candidates(found)
        return np.where(named.sum(1) > 0, np.where(named, found @ fitted, -np.inf).argmax(1), -1)

    return apply


RULES: dict[str, Rule] = {
    "single": single,
    "vote": vote,
    "weighted": weighted,
    "leader": follow,
    "average": average,
    "selector": selector,
}
"""By name, the simplest first."""


def log_odds(known: Ballot, right: Letters) -> NDArray[np.float64]:
    """Each member's log-odds of being right, as if it had been right once and wrong once more; shape (members,)."""
    hits = (known.answers == right).sum(1)
    odds: NDArray[np.float64] = np.log((hits + 1) / (len(right) - hits + 1))
    return odds


def _features(ballot_: Ballot, best: int, odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """What speaks for each letter of each question, shape (questions, letters, 5): the best member's answer, the share
    of the others that give it, whether all others do, the mean of how likely members find it, and the log-odds of those
    that give it."""
    named = _named(ballot_)
    others = np.delete(named, best, axis=0)
    share = others.mean(0) if len(others) else np.zeros_like(named[0])
    spoken = np.einsum("m,mql->ql", odds, named)
    return np.stack([named[best], share, share == 1, ballot_.shares.mean(0), spoken], axis=-1)


def _candidates(features: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which letters anybody named, shape (questions, letters)."""
    named: NDArray[np.bool_] = np.abs(features).sum(-1) > 0
    return named


def _named(ballot_: Ballot) -> NDArray[np.float64]:
    """1 where a member's answer is the letter, shape (members, questions, letters)."""
    same: NDArray[np.bool_] = ballot_.answers[:, :, None] == np.arange(ballot_.shares.shape[-1])
    return same.astype(np.float64)


def _most(score: NDArray[np.float64]) -> Letters:
    """The letter with the highest score; -1 where none has any."""
    return np.where(score.max(1) > 0, score.argmax(1), -1)


def _or_any(chosen: Letters, ballot_: Ballot) -> Letters:
    """The letter chosen, or where there is none the most frequent one."""
    return np.where(chosen < 0, _most(_named(ballot_).sum(0)), chosen)
