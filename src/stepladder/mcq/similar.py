"""Nearest texts by n-gram similarity, to choose examples for prompts. For duplicates see mcq/overlap.py."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from stepladder.mcq.overlap import ngrams

MAX_POOL_TEXTS = 512
"""A larger pool is sampled down to this many texts."""
HASH_BUCKETS = 4096
"""Dimensions of the vectors that n-grams are hashed into."""


def nearest(texts: Sequence[str], pool: Sequence[str], count: int, draw: random.Random) -> list[list[int]]:
    """For every text the indices of the ``count`` most similar texts of ``pool``, the most similar first.

    Similarity is the cosine of n-gram counts weighted by inverse document frequency in the pool. Ties are in an order
    that is drawn once for all texts. Time is linear in ``texts``.
    """
    sampled = draw.sample(range(len(pool)), min(MAX_POOL_TEXTS, len(pool)))
    if not sampled or not count:
        return [[] for _ in texts]
    vectors = np.stack([_vector(pool[index]) for index in sampled])
    idf = np.log((1 + len(vectors)) / (1 + (vectors > 0).sum(0)))
    vectors = _unit(vectors * idf)
    neighbours = []
    for text in texts:
        cosines = (vectors @ _unit(_vector(text) * idf)).round(9)  # so that rounding errors do not break ties
        neighbours.append([sampled[row] for row in np.argsort(-cosines, kind="stable")[:count]])
    return neighbours


def _vector(text: str) -> np.ndarray:
    return np.bincount((ngrams(text) % HASH_BUCKETS).astype(np.int64), minlength=HASH_BUCKETS).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))
