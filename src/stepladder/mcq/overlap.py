"""Near-duplicates between two sets of texts: training problems that also stand in validation or test.

Texts are compared as sets of n-grams of words, or of characters in scripts without spaces (Broder 1997, "On the
resemblance and containment of documents"). N-grams are weighted by how few texts have them, so that phrases that every
problem has make no twins. Similarities are exact; the candidates to compare are found by a text's rarest n-grams.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

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

    def __init__(self, flat: array[int] | None = None, ends: array[int] | None = None) -> None:
        self.flat = array("i") if flat is None else flat
        self.ends = array("q", [0]) if ends is None else ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for begin, end in pairwise(self.ends):
            yield np.array(self.flat[begin:end], dtype=np.int32)

    def append(self, row: np.ndarray) -> None:
        """Add a row of 32-bit integers."""
        self.flat.frombytes(row.tobytes())
        self.ends.append(len(self.flat))


class HeldOut:
    """The n-grams of the texts that others are compared with.

    Args:
        vocabulary: the distinct n-grams, sorted; one's id is its index.
        texts: the ids of every text.
    """

    def __init__(self, vocabulary: np.ndarray, texts: RaggedArray) -> None:
        self.vocabulary = vocabulary
        self.texts = [*texts]
        self.counts = _counts(texts, len(vocabulary))
        """Of the texts that have each n-gram."""
        self._rows = texts

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """The n-grams of these texts."""
        hashes = [ngrams(text) for text in texts]
        vocabulary, rows = np.unique(np.concatenate([ngrams(""), *hashes])), RaggedArray()
        for row in hashes:
            rows.append(np.searchsorted(vocabulary, row).astype(np.int32))
        return cls(vocabulary, rows)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Those that were saved."""
        with np.load(file) as arrays:
            return cls(arrays["vocabulary"], _ragged(arrays))

    def save(self, file: Path) -> None:
        np.savez(file, vocabulary=self.vocabulary, flat=self._rows.flat, ends=self._rows.ends)

    def shared_with(self, texts: Iterable[str]) -> Shared:
        """What other texts, iterated once and not kept, share with these. There must be a word in these."""
        shared = Shared(RaggedArray(), array("q"))
        for text in texts:
            hashes = ngrams(text)
            ids = np.minimum(np.searchsorted(self.vocabulary, hashes), len(self.vocabulary) - 1)
            ids = ids[self.vocabulary[ids] == hashes].astype(np.int32)
            shared.ids.append(ids)
            shared.others.append(len(hashes) - len(ids))
        return shared


class Shared(NamedTuple):
    """What texts share with those held out."""

    ids: RaggedArray
    """Of each text's n-grams that are in the vocabulary."""
    others: array[int]
    """How many of each text's n-grams are not."""

    @classmethod
    def load(cls, file: Path) -> Self:
        """What was saved."""
        with np.load(file) as arrays:
            return cls(_ragged(arrays), array("q", arrays["others"].tobytes()))

    def save(self, file: Path) -> None:
        np.savez(file, flat=self.ids.flat, ends=self.ids.ends, others=self.others)

    def counts(self, vocabulary: int) -> np.ndarray:
        """Of the texts that have each n-gram of a vocabulary of so many."""
        return _counts(self.ids, vocabulary)


class Comparer:
    """Finds the texts that are near to one held out.

    Args:
        held_out: the texts to compare with.
        counts: of all other texts that have each n-gram of the vocabulary.
        number: of those texts.
    """

    def __init__(self, held_out: HeldOut, counts: np.ndarray, number: int) -> None:
        total = number + len(held_out.texts)
        self._unshared_weight = np.log(total)  # of an n-gram that only one of the sets has, as if one text had it
        in_both = np.log(total / np.maximum(counts + held_out.counts, 1))
        self._weights = np.where(counts > 0, in_both, self._unshared_weight)
        self._held_out_weights = np.array([self._weights[ids].sum() for ids in held_out.texts])
        self._texts, self._counts = held_out.texts, held_out.counts
        owners = np.repeat(np.arange(len(self._texts), dtype=np.int32), [len(ids) for ids in self._texts])
        self._owners = owners[np.argsort(np.concatenate(self._texts), kind="stable")]
        self._begins = np.concatenate(
            [[0], np.cumsum(self._counts)]
        )  # texts with id i: owners[begins[i] : begins[i+1]]

    def pairs(self, shared: Shared, threshold: float) -> Iterator[Pair]:
        """Pairs of one of these texts and one held out with at least this similarity, in the order of these texts."""
        own_weights = np.zeros(len(self._weights))  # of the n-grams of one text, 0 elsewhere
        for number, (ids, unshared) in enumerate(zip(shared.ids, shared.others, strict=True)):
            others = self._candidates(ids)
            if not len(others):
                continue
            weight = self._weights[ids].sum() + unshared * self._unshared_weight
            own_weights[ids] = self._weights[ids]
            both = _sums(own_weights, [self._texts[other] for other in others])  # summed in another order than below
            own_weights[ids] = 0
            is_near = both >= threshold * (weight + self._held_out_weights[others] - both) - ROUNDING_TOLERANCE
            for other in others[is_near].tolist():
                exact = self._weights[np.intersect1d(ids, self._texts[other], assume_unique=True)].sum()
                union = weight + self._held_out_weights[other] - exact
                if union > 0 and exact / union >= threshold:
                    yield Pair(number, other, float(exact / union))

    def _candidates(self, ids: np.ndarray) -> np.ndarray:
        """Indices of the texts held out that have at least a quarter of the rarest of these n-grams."""
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
    ``right`` and those that ``left`` shares with it; texts of ``left`` are not kept. shards/near.py does the same in
    several processes.
    """
    held_out = HeldOut.of(right)
    if not len(held_out.vocabulary):
        return []
    shared = held_out.shared_with(left)
    counts = shared.counts(len(held_out.vocabulary))
    return ranked(Comparer(held_out, counts, len(shared.ids)).pairs(shared, threshold))


def ranked(pairs: Iterable[Pair]) -> list[Pair]:
    """The most similar first; of like ones, in the order of the texts."""
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.left, pair.right))


def _counts(rows: RaggedArray, size: int) -> np.ndarray:
    """How many rows hold each of so many ids."""
    return np.bincount(np.frombuffer(rows.flat, dtype=np.int32), minlength=size)


def _ragged(arrays: Mapping[str, np.ndarray]) -> RaggedArray:
    return RaggedArray(array("i", arrays["flat"].tobytes()), array("q", arrays["ends"].tobytes()))


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
