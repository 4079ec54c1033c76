"""Which texts of one set stand, almost, in another: training problems that would give a test away.

Texts are sets of n-grams of words, and of single characters where a script has no spaces (Broder 1997, "On the
resemblance and containment of documents"). An n-gram weighs the more the fewer texts have it, so that phrases every
problem ends with make nobody a twin. Comparing is exact;
only who is compared is chosen by the rarest n-grams a text shares with the other set.
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

GRAM = 4
"""Words or characters of an n-gram."""
TWIN = 0.25
"""Similarity from which two problems are one in other words. Of the contest's problems five pairs reach it, all of them
twins; of the demo's generated ones, which share their phrases, the nearest pair has 0.20."""
RAREST = 32
"""N-grams of a text by which its candidates are found: whoever has a quarter of them."""
COMMON = 500
"""An n-gram in more texts than that finds nobody."""
ROUNDING = 1e-6
"""More than two sums of the same weights differ by."""

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"  # kana, Han, Hangul
_WORD = re.compile(rf"[{_ALONE}]|\d+|[^\W\d_{_ALONE}]+")


class Pair(NamedTuple):
    """Two texts, by their places, and how alike they are: weighted Jaccard similarity, 0 to 1."""

    left: int
    right: int
    similarity: float


class Rows:
    """Rows of places, end to end: a million small arrays would weigh more than what stands in them."""

    def __init__(self) -> None:
        self._flat = array("i")
        self._ends = array("q", [0])

    def __iter__(self) -> Iterator[np.ndarray]:
        for begin, end in pairwise(self._ends):
            yield np.array(self._flat[begin:end], dtype=np.int32)

    def append(self, row: np.ndarray) -> None:
        """Add a row of 32-bit numbers."""
        self._flat.frombytes(row.tobytes())
        self._ends.append(len(self._flat))


class Holding:
    """Which texts hold an n-gram."""

    def __init__(self, places: list[np.ndarray], counts: np.ndarray) -> None:
        owner = np.repeat(np.arange(len(places), dtype=np.int32), [len(found) for found in places])
        self._owner = owner[np.argsort(np.concatenate(places), kind="stable")]
        self._counts = counts
        self._begins = np.concatenate([[0], np.cumsum(counts)])  # of i: owner[begins[i] : begins[i + 1]]

    def candidates(self, found: np.ndarray) -> np.ndarray:
        """Texts that hold some of the rarest n-grams of a text."""
        few: np.ndarray = found[self._counts[found] <= COMMON]
        if len(few) > RAREST:
            few = few[np.argpartition(self._counts[few], RAREST)[:RAREST]]
        if not len(few):
            return few
        others = np.concatenate([self._owner[self._begins[i] : self._begins[i + 1]] for i in few])
        return np.flatnonzero(np.bincount(others) >= max(1, len(few) // 4))


def whole(questions: Sequence[Question]) -> str:
    """All that is read of a problem: its text, its questions, their options."""
    texts = (f"{question.question}\n{' '.join(question.options)}" for question in questions)
    return "\n".join((questions[0].problem, *texts))


def near_duplicates(left: Iterable[str], right: Iterable[str], threshold: float) -> list[Pair]:
    """Pairs of a text of ``left`` and one of ``right`` that are at least so similar, the most similar first.

    Both are read once, ``left`` not at all where ``right`` has no words. Memory grows with the n-grams of ``right`` and
    those ``left`` shares with it; no text of ``left`` is held.
    """
    held = [ngrams(text) for text in right]
    known = np.unique(np.concatenate([ngrams(""), *held]))
    if not len(known):
        return []
    places = [np.searchsorted(known, grams) for grams in held]  # each text as places in ``known``
    counts = np.zeros(len(known), dtype=np.int64)  # texts of both sets that have it
    for found in places:
        counts[found] += 1
    holders = counts.copy()
    shared = Rows()
    alone = array("q")  # n-grams that ``right`` does not have
    for text in left:
        grams = ngrams(text)
        found = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        found = found[known[found] == grams].astype(np.int32)
        counts[found] += 1
        shared.append(found)
        alone.append(len(grams) - len(found))
    total = len(alone) + len(held)
    rare = np.log(total)  # of an n-gram that only one of the sets has, as if one text had it
    weight = np.where(counts > holders, np.log(total / counts), rare)
    weights = np.array([weight[found].sum() for found in places])
    holding = Holding(places, holders)
    mine = np.zeros(len(known))  # weights of what the text at hand has
    pairs: list[Pair] = []
    for index, (found, unshared) in enumerate(zip(shared, alone, strict=True)):
        others = holding.candidates(found)
        if not len(others):
            continue
        own = weight[found].sum() + unshared * rare
        mine[found] = weight[found]
        near = _sums(mine, [places[other] for other in others])  # what they share; rounded in another order than below
        mine[found] = 0
        for other in others[near >= threshold * (own + weights[others] - near) - ROUNDING].tolist():
            both = weight[np.intersect1d(found, places[other], assume_unique=True)].sum()
            union = own + weights[other] - both
            if union > 0 and both / union >= threshold:
                pairs.append(Pair(index, other, float(both / union)))
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.left, pair.right))


def _sums(values: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """The sum of the values at the places of each row; no row is empty."""
    sums: np.ndarray = np.add.reduceat(values[np.concatenate(rows)], np.cumsum([0, *map(len, rows[:-1])]))
    return sums


def ngrams(text: str) -> np.ndarray:
    """Hashes of the distinct n-grams of a text, sorted; of a shorter text, of the whole."""
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
    letters = np.array(words, dtype=np.uint64)
    size = min(GRAM, len(letters))
    if not size:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, size)
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for column in range(size):  # like FNV-1a, 64 bits; it wraps around
        hashes = (hashes ^ windows[:, column]) * np.uint64(0x100000001B3)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)
