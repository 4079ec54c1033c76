"""Which texts of one set stand, almost, in another: training problems that would give a test away.

Texts are sets of n-grams of words, and of single characters where a script has no spaces (Broder 1997, "On the
resemblance and containment of documents"). An n-gram weighs the more the fewer texts have it, so that phrases every
problem ends with make nobody a twin. Comparing is exact;
only who is compared is chosen by the rarest n-grams a text shares with the other set.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
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
BATCH = 2000
"""Texts worked on at a time."""

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"  # kana, Han, Hangul
_WORD = re.compile(rf"[{_ALONE}]|\d+|[^\W\d_{_ALONE}]+")


class Pair(NamedTuple):
    """Two texts, by their places, and how alike they are: weighted Jaccard similarity, 0 to 1."""

    left: int
    right: int
    similarity: float


def whole(questions: Sequence[Question]) -> str:
    """All that is read of a problem: its text, its questions, their options."""
    asked = (f"{question.question}\n{' '.join(question.options)}" for question in questions)
    return "\n".join((questions[0].problem, *asked))


def near_duplicates(left: Sequence[str], right: Sequence[str], threshold: float) -> list[Pair]:
    """Pairs of a text of ``left`` and one of ``right`` that are at least so similar, the most similar first.

    Memory grows with the n-grams of ``right`` and those ``left`` shares with it.
    """
    held = [ngrams(text) for text in right]
    known = np.unique(np.concatenate([ngrams(""), *held]))
    if not left or not len(known):
        return []
    places = [np.searchsorted(known, grams) for grams in held]  # each text as places in ``known``
    counts = np.zeros(len(known), dtype=np.int64)  # texts of both sets that have it
    for found in places:
        counts[found] += 1
    holders = counts.copy()
    shared: list[np.ndarray] = []
    alone = np.zeros(len(left), dtype=np.int64)  # n-grams that ``right`` does not have
    for at, text in enumerate(left):
        grams = ngrams(text)
        found = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        found = found[known[found] == grams].astype(np.int32)
        counts[found] += 1
        shared.append(found)
        alone[at] = len(grams) - len(found)
    total = len(left) + len(right)
    rare = np.log(total)  # of an n-gram that only one of the sets has, as if one text had it
    weight = np.where(counts > holders, np.log(total / counts), rare)
    weights = np.array([weight[found].sum() for found in places])
    pairs: list[Pair] = []
    for start, candidates in _candidates(shared, places, holders):
        for at, other in candidates:
            both = weight[np.intersect1d(shared[start + at], places[other], assume_unique=True)].sum()
            union = weight[shared[start + at]].sum() + alone[start + at] * rare + weights[other] - both
            if union > 0 and both / union >= threshold:
                pairs.append(Pair(start + at, other, float(both / union)))
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.left, pair.right))


def ngrams(text: str) -> np.ndarray:
    """Hashes of the distinct n-grams of a text, sorted; of a shorter text, of the whole."""
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
    letters = np.array(words, dtype=np.uint64)
    size = min(GRAM, len(letters))
    if not size:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, size)
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for column in range(size):  # in the manner of FNV-1a, 64 bits; it wraps around
        hashes = (hashes ^ windows[:, column]) * np.uint64(0x100000001B3)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def _candidates(
    shared: list[np.ndarray], places: list[np.ndarray], holders: np.ndarray
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Pairs that share some of the left text's rarest n-grams, batch by batch: (first left text, [(left, right)])."""
    flat = np.concatenate(places)
    owner = np.repeat(np.arange(len(places), dtype=np.int32), [len(found) for found in places])
    owner = owner[np.argsort(flat, kind="stable")]
    begins = np.concatenate([[0], np.cumsum(holders)])  # who holds an n-gram: owner[begins[i] : begins[i + 1]]
    for start in range(0, len(shared), BATCH):
        keys = []
        for at, found in enumerate(shared[start : start + BATCH]):
            few = found[holders[found] <= COMMON]
            if len(few) > RAREST:
                few = few[np.argpartition(holders[few], RAREST)[:RAREST]]
            if len(few):
                others = np.concatenate([owner[begins[i] : begins[i + 1]] for i in few])
                hits = np.bincount(others, minlength=1)
                enough = np.flatnonzero(hits >= max(1, len(few) // 4))
                keys += [(at, int(other)) for other in enough]
        yield start, keys
