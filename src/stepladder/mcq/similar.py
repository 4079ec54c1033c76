"""Which texts are most like a text: for examples worth showing, not for finding duplicates (mcq/overlap.py)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from stepladder.mcq.overlap import ngrams

POOL = 512
"""Texts that are compared; of more, as many are drawn."""
BUCKETS = 4096
"""Dimensions the n-grams are hashed into."""


def nearest(texts: Sequence[str], pool: Sequence[str], count: int, draw: random.Random) -> list[list[int]]:
    """For every text the places of the ``count`` texts of ``pool`` most like it, the most similar first.

    Cosine similarity of n-gram counts weighted by how rare an n-gram is in the pool. Ties, and texts like nothing, are
    served in an order drawn once. Time is linear in ``texts``.
    """
    places = draw.sample(range(len(pool)), min(POOL, len(pool)))
    if not places or not count:
        return [[] for _ in texts]
    held = np.stack([_vector(pool[place]) for place in places])
    weight = np.log((1 + len(held)) / (1 + (held > 0).sum(0)))
    held = _unit(held * weight)
    found = []
    for text in texts:
        likeness = (held @ _unit(_vector(text) * weight)).round(9)  # rounding errors break no ties
        found.append([places[place] for place in np.argsort(-likeness, kind="stable")[:count]])
    return found


def _vector(text: str) -> np.ndarray:
    return np.bincount((ngrams(text) % BUCKETS).astype(np.int64), minlength=BUCKETS).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))
