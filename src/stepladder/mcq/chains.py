"""Choose among several chains for one question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepladder.mcq.overlap import ngrams

DUPLICATE_SIMILARITY = 0.9
"""Jaccard similarity of n-grams from which two chains count as the same."""


def most_different(texts: Sequence[str], count: int) -> list[int]:
    """Indices of up to ``count`` texts, sorted: the first text, then repeatedly the one least similar to those chosen.

    Stops early where every other text is a duplicate (:data:`DUPLICATE_SIMILARITY`) of one that is chosen.
    """
    if not texts:
        return []
    grams = [ngrams(text) for text in texts]
    chosen = [0]
    closest = np.array([similarity(grams[0], other) for other in grams])
    while len(chosen) < count:
        closest[chosen] = 1.0
        best = int(closest.argmin())
        if closest[best] >= DUPLICATE_SIMILARITY:
            break
        chosen.append(best)
        closest = np.maximum(closest, [similarity(grams[best], other) for other in grams])
    return sorted(chosen)


def shortest(texts: Sequence[str], count: int) -> list[int]:
    """Indices of up to ``count`` texts, sorted: the shortest ones, of equal ones the first."""
    return sorted(sorted(range(len(texts)), key=lambda index: len(texts[index]))[:count])


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two results of :func:`stepladder.mcq.overlap.ngrams`; 1 if both are empty."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - both
    return both / union if union else 1.0
