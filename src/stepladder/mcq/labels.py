"""Which labels are wrong? Evidence from models that answered independently of the label.

Counting heads is not enough: models differ in how good they are, and those of one family err together. The
model of Dawid and Skene (1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm"), in its
one-coin form, learns each model's accuracy from its agreement with all others; the label has no vote in it. What models
say together counts only as much as their errors are independent, after Kish's design effect (1965).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Votes = Mapping[str, Sequence[str | None]]
"""Letters that each model gave to one question; None is an answer nobody could read."""

ROUNDS = 200
SETTLED = 1e-6
PRIOR = (2.0, 1.0)
"""Pseudo-counts of right and wrong answers a model starts with: better than a guess until it shows otherwise."""


class Suspect(NamedTuple):
    """A label and what the models say against it."""

    id: str
    label: str
    suggested: str
    """The letter other than the label with the most evidence."""
    score: float
    """Log-odds of ``suggested`` against ``label`` (natural logarithm); above 0 the models think the label wrong."""


class Evidence(NamedTuple):
    """What the votes come to."""

    accuracy: dict[str, float]
    """Of each model, estimated without the labels."""
    independent: float
    """How many independent models they are worth together."""
    suspects: list[Suspect]
    """Every question on which some vote contradicts the label, the most suspect first."""


def weigh(votes: Mapping[str, Votes], labels: Mapping[str, str]) -> Evidence:
    """Rank labels by the evidence against them. Questions without a readable vote are passed over.

    Args:
        votes: by question, then by model. Repeated answers of one model share its one vote.
        labels: by question.
    """
    ids = [key for key in votes if key in labels and any(any(said) for said in votes[key].values())]
    if not ids:
        return Evidence({}, 0.0, [])
    models = sorted({model for key in ids for model in votes[key]})
    letters = sorted({letter for key in ids for said in votes[key].values() for letter in said if letter})
    letters = sorted({*letters, *(labels[key] for key in ids)})
    shares = _shares([votes[key] for key in ids], models, letters)  # (questions, models, letters)
    named = np.array([[letter == labels[key] for letter in letters] for key in ids])
    choices = np.maximum(2, ((shares.sum(1) > 0) | named).sum(1))  # letters in play, (questions,)
    independence = _independence(shares, named)
    accuracy = _fit(shares, choices, independence / independence.mean())
    odds = _odds(shares, choices, accuracy, independence)
    suspects = []
    for row, key in enumerate(ids):
        contrary = [(odds[row, i], letter) for i, letter in enumerate(letters) if letter != labels[key]]
        against = [pair for pair in contrary if shares[row, :, letters.index(pair[1])].any()]
        if against:
            best, suggested = max(against, key=lambda pair: (pair[0], pair[1]))
            score = float(best - odds[row, letters.index(labels[key])])
            suspects.append(Suspect(key, labels[key], suggested, round(score, 4)))
    suspects.sort(key=lambda suspect: (-suspect.score, suspect.id))
    return Evidence(
        {model: float(a) for model, a in zip(models, accuracy, strict=True)}, float(independence.sum()), suspects
    )


def _shares(votes: Sequence[Votes], models: list[str], letters: list[str]) -> np.ndarray:
    """Share of each model's readable answers that name a letter, shape (questions, models, letters)."""
    shares = np.zeros((len(votes), len(models), len(letters)))
    for row, said in enumerate(votes):
        for model, given in said.items():
            known = [letter for letter in given if letter]
            for letter in known:
                shares[row, models.index(model), letters.index(letter)] += 1 / len(known)
    return shares


def _independence(shares: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """What the vote of each model is worth, shape (models,): 1 alone, 1/n for n that err as one.

    Errors are counted against the labels, most of which are right: counted against what most models say, a crowd that
    speaks with one voice would never err.
    """
    present = shares.sum(2) > 0  # (questions, models)
    error = np.where(present, 1 - np.einsum("qml,ql->qm", shares, labelled), 0.0)
    known = np.where(present, error - error.sum(0) / np.maximum(1, present.sum(0)), 0.0)
    both = present.T.astype(float) @ present
    spread = np.sqrt((known**2).T @ present)  # of one model where the other voted too
    correlation = (known.T @ known) / np.maximum(spread * spread.T, 1e-12)
    chance = 2 / np.sqrt(np.maximum(1.0, both))  # two standard errors: less than that may be nothing
    shared = np.where(correlation > chance, correlation, 0.0)
    np.fill_diagonal(shared, 1.0)
    return np.asarray(1 / shared.sum(1))


def _fit(shares: np.ndarray, choices: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """EM: the accuracy of every model, shape (models,)."""
    voted = shares.sum((0, 2))  # answers of each model
    named = shares.sum(1) > 0
    truth = np.einsum("qml,m->ql", shares, weight)  # to begin with, what most say
    truth /= np.maximum(truth.sum(1, keepdims=True), 1e-12)
    accuracy = np.zeros(shares.shape[1])
    for _ in range(ROUNDS):
        before = accuracy
        accuracy = (np.einsum("qml,ql->m", shares, truth) + PRIOR[0]) / (voted + sum(PRIOR))
        odds = np.where(named, _odds(shares, choices, accuracy, weight), -np.inf)
        truth = np.where(named, np.exp(odds - odds.max(1, keepdims=True)), 0.0)
        truth /= truth.sum(1, keepdims=True)
        if np.abs(accuracy - before).max() < SETTLED:
            break
    return accuracy


def _odds(shares: np.ndarray, choices: np.ndarray, accuracy: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Log-likelihood of every letter up to a constant, shape (questions, letters): a vote of a model with accuracy a
    is worth log(a (K - 1) / (1 - a)) among K letters, and nothing where that is worse than a guess."""
    base = np.log(accuracy / (1 - accuracy))  # (models,)
    worth = np.maximum(0.0, base[None, :] + np.log(choices - 1)[:, None]) * weight[None, :]
    return np.asarray(np.einsum("qml,qm->ql", shares, worth))
