"""Which problems in pieces of files are nearly problems that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepladder import records
from stepladder.mcq.overlap import HeldOut, Pair, Shared, ranked
from stepladder.shards import near
from stepladder.shards.each import Pool


class NearHeldOut(NamedTuple):
    """A problem that is nearly one held out."""

    piece: int
    """Index of its order."""
    id: str
    line: int
    """Of its file."""
    held_out: int
    """Index of the text that it is near to."""
    similarity: float
    """0 to 1."""


def near_held_out(
    pool: Pool, texts: Iterable[str], function: str, orders: Sequence[Mapping[str, Any]]
) -> list[NearHeldOut]:
    """Pairs of a problem in some pieces and a held-out text, the most similar first. ``function`` is the one of work.py
    that reads a piece: ``shared`` of question files, ``shared_texts`` of files of texts; ``orders`` are its orders
    without the held-out texts. Where no held-out text has a word, no piece is read.

    Raises:
        UserError: a piece has an error.
        PieceError: a piece's process was lost too often.
    """
    held_out = HeldOut.of(texts)
    if not len(held_out.vocabulary):
        return []
    file, counts = pool.folder / "held-out.npz", pool.folder / "counts.npy"
    held_out.save(file)
    common = {"held_out": str(file.absolute())}
    pieces = pool.each(function, "n-grams", [{**common, **order} for order in orders])
    total, begins = np.zeros(len(held_out.vocabulary), dtype=np.int64), [0]
    for piece in pieces:
        shared = Shared.load(piece / near.NGRAMS)
        total += shared.counts(len(total))
        begins.append(begins[-1] + len(shared.ids))
    np.save(counts, total)
    counted = {"counts": str(counts.absolute()), "number": begins[-1]}
    results = pool.each(
        "pairs", "near-duplicates", [{**common, **counted, "piece": str(piece.absolute())} for piece in pieces]
    )
    places: dict[int, tuple[int, str, int]] = {}
    pairs = list[Pair]()
    for number, (begin, result) in enumerate(zip(begins, results, strict=False)):
        for _, (index, name, line, other, similarity) in records.parse_lines(result / near.PAIRS):
            places[begin + index] = number, name, line
            pairs.append(Pair(begin + index, other, similarity))
    return [NearHeldOut(*places[pair.left], pair.right, pair.similarity) for pair in ranked(pairs)]
