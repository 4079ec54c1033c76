"""Which of several chains for one question are worth keeping."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepladder.mcq.overlap import ngrams

SAME = 0.9
"""Jaccard similarity of n-grams from which two chains are one."""


def most_different(texts: Sequence[str], count: int) -> list[int]:
    """Places of up to ``count`` texts, in order: the first, then again and again the one least like those taken.

    Fewer where the rest only repeats: what shares 0.9 of its n-grams (mcq/overlap.py) with one taken says nothing new.
    """
    if not texts:
        return []
    held = [ngrams(text) for text in texts]
    taken = [0]
    nearest = np.array([similarity(held[0], second) for second in held])
    while len(taken) < count:
        nearest[taken] = 1.0
        best = int(nearest.argmin())
        if nearest[best] >= SAME:
            break
        taken.append(best)
        nearest = np.maximum(nearest, [similarity(held[best], second) for second in held])
    return sorted(taken)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sets of n-grams, as mcq/overlap.py makes them."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - both
    return both / union if union else 1.0
