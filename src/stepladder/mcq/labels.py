"""Find labels that may be wrong, from the votes of models that did not see them.

A majority is not enough: models differ in accuracy, and models of one family make the same errors. The one-coin model
of Dawid and Skene (1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm") estimates each
model's accuracy from its agreement with the others, without the labels. Votes of models whose errors are correlated are
given less weight, after Kish's design effect (1965).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Votes = Mapping[str, Sequence[str | None]]
"""The letters that each model gave for one question; None is an answer that could not be read."""

MAX_ITERATIONS = 200
TOLERANCE = 1e-6
"""EM ends when no model's accuracy changes by more."""
PRIOR_COUNTS = (2.0, 1.0)
"""Pseudo-counts of right and wrong answers of every model: until its votes show otherwise, it is right two times in
three.
"""


class Suspect(NamedTuple):
    """A label that some model's vote contradicts."""

    id: str
    label: str
    suggested: str
    """The letter with the most evidence, of those that models voted for instead of the label."""
    score: float
    """Log-odds of ``suggested`` against ``label`` (natural logarithm); above 0 the models think the label wrong."""


class Evidence(NamedTuple):
    """The result of :func:`weigh`."""

    accuracy: dict[str, float]
    """Accuracy of each model, estimated without the labels."""
    independent: float
    """Effective number of independent models."""
    suspects: list[Suspect]
    """Every question with a vote that contradicts its label, the most suspect first."""


def weigh(votes: Mapping[str, Votes], labels: Mapping[str, str]) -> Evidence:
    """Rank labels by the evidence against them. Questions without a readable vote are left out.

    Args:
        votes: by question id; several answers of one model share its one vote.
        labels: by question id.
    """
    ids = [key for key in votes if key in labels and any(any(answers) for answers in votes[key].values())]
    if not ids:
        return Evidence({}, 0.0, [])
    models = sorted({model for key in ids for model in votes[key]})
    letters = sorted({letter for key in ids for answers in votes[key].values() for letter in answers if letter})
    letters = sorted({*letters, *(labels[key] for key in ids)})
    shares = _shares([votes[key] for key in ids], models, letters)  # (questions, models, letters)
    labelled = np.array([[letter == labels[key] for letter in letters] for key in ids])
    letter_counts = np.maximum(
        2, ((shares.sum(1) > 0) | labelled).sum(1)
    )  # letters voted for or labelled, (questions,)
    independence = _independence(shares, labelled)
    accuracy = _fit_accuracy(shares, letter_counts, independence / independence.mean())
    log_likelihoods = _log_likelihoods(shares, letter_counts, accuracy, independence)
    suspects = []
    for row, key in enumerate(ids):
        alternatives = [(log_likelihoods[row, i], letter) for i, letter in enumerate(letters) if letter != labels[key]]
        contradicting = [pair for pair in alternatives if shares[row, :, letters.index(pair[1])].any()]
        if contradicting:
            best, suggested = max(contradicting, key=lambda pair: (pair[0], pair[1]))
            score = float(best - log_likelihoods[row, letters.index(labels[key])])
            suspects.append(Suspect(key, labels[key], suggested, round(score, 4)))
    suspects.sort(key=lambda suspect: (-suspect.score, suspect.id))
    return Evidence(
        {model: float(a) for model, a in zip(models, accuracy, strict=True)}, float(independence.sum()), suspects
    )


def _shares(votes: Sequence[Votes], models: list[str], letters: list[str]) -> np.ndarray:
    """Share of each model's readable answers that name a letter, shape (questions, models, letters)."""
    shares = np.zeros((len(votes), len(models), len(letters)))
    for row, answers in enumerate(votes):
        for model, letters_of_model in answers.items():
            readable = [letter for letter in letters_of_model if letter]
            for letter in readable:
                shares[row, models.index(model), letters.index(letter)] += 1 / len(readable)
    return shares


def _independence(shares: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Weight of each model's vote, shape (models,): 1 if its errors are independent, 1/n for n models with the same
    errors.

    Errors are counted against the labels, most of which are right. Against the majority vote, a large group of models
    that always agree would have no errors.
    """
    present = shares.sum(2) > 0  # (questions, models)
    error = np.where(present, 1 - np.einsum("qml,ql->qm", shares, labelled), 0.0)
    centred = np.where(present, error - error.sum(0) / np.maximum(1, present.sum(0)), 0.0)
    common = present.T.astype(float) @ present
    norms = np.sqrt((centred**2).T @ present)  # of one model, over the questions the other voted on too
    correlation = (centred.T @ centred) / np.maximum(norms * norms.T, 1e-12)
    chance = 2 / np.sqrt(np.maximum(1.0, common))  # two standard errors: smaller correlations may be chance
    shared = np.where(correlation > chance, correlation, 0.0)
    np.fill_diagonal(shared, 1.0)
    return np.asarray(1 / shared.sum(1))


def _fit_accuracy(shares: np.ndarray, letter_counts: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Accuracy of every model by expectation maximisation, shape (models,)."""
    answers = shares.sum((0, 2))  # answers of each model
    has_votes = shares.sum(1) > 0
    truth = np.einsum("qml,m->ql", shares, weight)  # initially the majority
    truth /= np.maximum(truth.sum(1, keepdims=True), 1e-12)
    accuracy = np.zeros(shares.shape[1])
    for _ in range(MAX_ITERATIONS):
        previous = accuracy
        accuracy = (np.einsum("qml,ql->m", shares, truth) + PRIOR_COUNTS[0]) / (answers + sum(PRIOR_COUNTS))
        log_likelihoods = np.where(has_votes, _log_likelihoods(shares, letter_counts, accuracy, weight), -np.inf)
        truth = np.where(has_votes, np.exp(log_likelihoods - log_likelihoods.max(1, keepdims=True)), 0.0)
        truth /= truth.sum(1, keepdims=True)
        if np.abs(accuracy - previous).max() < TOLERANCE:
            break
    return accuracy


def _log_likelihoods(
    shares: np.ndarray, letter_counts: np.ndarray, accuracy: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Log-likelihood of every letter up to a constant, shape (questions, letters). The vote of a model with accuracy a
    adds log(a (K - 1) / (1 - a)) among K letters, and nothing if the model is worse than a guess."""
    log_odds = np.log(accuracy / (1 - accuracy))  # (models,)
    vote_weights = np.maximum(0.0, log_odds[None, :] + np.log(letter_counts - 1)[:, None]) * weight[None, :]
    return np.asarray(np.einsum("qml,qm->ql", shares, vote_weights))
