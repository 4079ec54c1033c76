"""Near-duplicates between two sets of texts: training problems that also stand in validation or test.

Texts are compared as sets of n-grams of words, or of characters in scripts without spaces (Broder 1997, "On the
resemblance and containment of documents"). N-grams are weighted by how few texts have them, so that phrases that every
problem has make no twins. Similarities are exact; the candidates to compare are found by a text's rarest n-grams.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from stepladder.records import Question

NGRAM_SIZE = 4
"""Words or characters in an n-gram."""
TWIN_SIMILARITY = 0.25
"""Similarity from which two problems are twins. Five pairs of the contest's problems reach it, all of them twins; the
most similar pair of the demo's generated problems, which share their phrases, has 0.20."""
CANDIDATE_NGRAMS = 32
"""Number of a text's rarest n-grams that are looked up; texts that share a quarter of them are candidates."""
MAX_TEXTS_PER_NGRAM = 500
"""N-grams in more texts than this are not looked up."""
ROUNDING_TOLERANCE = 1e-6
"""Bound on the difference between two sums of the same weights in different orders."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"  # kana, Han, Hangul
_WORD = re.compile(rf"[{_UNSPACED}]|\d+|[^\W\d_{_UNSPACED}]+")


class Pair(NamedTuple):
    """Two texts, by their index in each set, and their weighted Jaccard similarity, 0 to 1."""

    left: int
    right: int
    similarity: float


class RaggedArray:
    """Integer rows of different lengths in one flat array; a million small arrays would need far more memory."""

    def __init__(self) -> None:
        self._flat = array("i")
        self._ends = array("q", [0])

    def __iter__(self) -> Iterator[np.ndarray]:
        for begin, end in pairwise(self._ends):
            yield np.array(self._flat[begin:end], dtype=np.int32)

    def append(self, row: np.ndarray) -> None:
        """Add a row of 32-bit integers."""
        self._flat.frombytes(row.tobytes())
        self._ends.append(len(self._flat))


class InvertedIndex:
    """The texts that have each n-gram.

    Args:
        texts: the n-gram ids of every text.
        counts: how many of the texts have each n-gram id.
    """

    def __init__(self, texts: list[np.ndarray], counts: np.ndarray) -> None:
        owners = np.repeat(np.arange(len(texts), dtype=np.int32), [len(ids) for ids in texts])
        self._owners = owners[np.argsort(np.concatenate(texts), kind="stable")]
        self._counts = counts
        self._begins = np.concatenate([[0], np.cumsum(counts)])  # texts with id i: owners[begins[i] : begins[i + 1]]

    def candidates(self, ids: np.ndarray) -> np.ndarray:
        """Indices of the texts that have at least a quarter of the rarest of these n-grams."""
        rare: np.ndarray = ids[self._counts[ids] <= MAX_TEXTS_PER_NGRAM]
        if len(rare) > CANDIDATE_NGRAMS:
            rare = rare[np.argpartition(self._counts[rare], CANDIDATE_NGRAMS)[:CANDIDATE_NGRAMS]]
        if not len(rare):
            return rare
        owners = np.concatenate([self._owners[self._begins[i] : self._begins[i + 1]] for i in rare])
        return np.flatnonzero(np.bincount(owners) >= max(1, len(rare) // 4))


def problem_text(questions: Sequence[Question]) -> str:
    """The text of a problem with its questions and their options, as it is compared with other problems."""
    texts = (f"{question.question}\n{' '.join(question.options)}" for question in questions)
    return "\n".join((questions[0].problem, *texts))


def near_duplicates(left: Iterable[str], right: Iterable[str], threshold: float) -> list[Pair]:
    """Pairs of a text of ``left`` and a text of ``right`` with at least this similarity, the most similar first.

    Both are iterated once, ``left`` not at all if no text of ``right`` has a word. Memory grows with the n-grams of
    ``right`` and those that ``left`` shares with it; texts of ``left`` are not kept.
    """
    right_ngrams = [ngrams(text) for text in right]
    vocabulary = np.unique(np.concatenate([ngrams(""), *right_ngrams]))
    if not len(vocabulary):
        return []
    right_ids = [np.searchsorted(vocabulary, hashes) for hashes in right_ngrams]  # indices into the vocabulary
    counts = np.zeros(len(vocabulary), dtype=np.int64)  # texts of both sets that have each n-gram
    for ids in right_ids:
        counts[ids] += 1
    right_counts = counts.copy()
    left_ids = RaggedArray()  # for each text of ``left`` its n-grams that are in the vocabulary
    unshared_counts = array("q")  # and how many are not
    for text in left:
        hashes = ngrams(text)
        ids = np.minimum(np.searchsorted(vocabulary, hashes), len(vocabulary) - 1)
        ids = ids[vocabulary[ids] == hashes].astype(np.int32)
        counts[ids] += 1
        left_ids.append(ids)
        unshared_counts.append(len(hashes) - len(ids))
    total = len(unshared_counts) + len(right_ngrams)
    unshared_weight = np.log(total)  # of an n-gram that only one of the sets has, as if one text had it
    weights = np.where(counts > right_counts, np.log(total / counts), unshared_weight)
    right_weights = np.array([weights[ids].sum() for ids in right_ids])
    index = InvertedIndex(right_ids, right_counts)
    own_weights = np.zeros(len(vocabulary))  # of the n-grams of one text of ``left``, 0 elsewhere
    pairs: list[Pair] = []
    for number, (ids, unshared) in enumerate(zip(left_ids, unshared_counts, strict=True)):
        others = index.candidates(ids)
        if not len(others):
            continue
        left_weight = weights[ids].sum() + unshared * unshared_weight
        own_weights[ids] = weights[ids]
        shared = _sums(own_weights, [right_ids[other] for other in others])  # summed in another order than below
        own_weights[ids] = 0
        is_near = shared >= threshold * (left_weight + right_weights[others] - shared) - ROUNDING_TOLERANCE
        for other in others[is_near].tolist():
            both = weights[np.intersect1d(ids, right_ids[other], assume_unique=True)].sum()
            union = left_weight + right_weights[other] - both
            if union > 0 and both / union >= threshold:
                pairs.append(Pair(number, other, float(both / union)))
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.left, pair.right))


def _sums(values: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """The sum of the values at the indices in each row; no row may be empty."""
    sums: np.ndarray = np.add.reduceat(values[np.concatenate(rows)], np.cumsum([0, *map(len, rows[:-1])]))
    return sums


def ngrams(text: str) -> np.ndarray:
    """Sorted hashes of the distinct n-grams of a text; a shorter text is one n-gram."""
    token_hashes = [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
    tokens = np.array(token_hashes, dtype=np.uint64)
    size = min(NGRAM_SIZE, len(tokens))
    if not size:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for column in range(size):  # like FNV-1a, 64 bits; it wraps around
        hashes = (hashes ^ windows[:, column]) * np.uint64(0x100000001B3)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)
