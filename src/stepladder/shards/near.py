"""Near-duplicates of held-out problems in a piece of a file, in two passes: how similar two texts are depends on how
many texts have each n-gram, so n-grams are counted in all pieces before texts are compared in any."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from stepladder.mcq.overlap import TWIN_SIMILARITY, Comparer, HeldOut, Shared, problem_text
from stepladder.mcq.questionfile import stream_problems
from stepladder.records import Span, parse_lines

NGRAMS, PLACES, PAIRS = "ngrams.npz", "places.jsonl", "pairs.jsonl"
"""Files of results: what a piece shares with the held-out problems; ``[id, line]`` of each of its problems; pairs as
``[index in the piece, id, line, index of the held-out problem, similarity]``."""


def shared(order: Mapping[str, Any], result: Path) -> None:
    """The n-grams of a piece: of lines ``span`` of question file ``file`` in ``language``, against those in
    ``held_out``."""
    problems = stream_problems(Path(order["file"]), order["language"], labelled=True, span=Span(*order["span"]))
    _share(order, result, ((problem.id, problem.line, problem_text(problem.questions)) for problem in problems))


def shared_texts(order: Mapping[str, Any], result: Path) -> None:
    """The same of lines ``[id, text]`` of ``file``."""
    rows = parse_lines(Path(order["file"]), Span(*order["span"]))
    _share(order, result, ((name, line, text) for line, (name, text) in rows))


def _share(order: Mapping[str, Any], result: Path, problems: Iterator[tuple[str, int, str]]) -> None:
    """The n-grams of problems, by their ids, lines and texts."""
    with (result / PLACES).open("w", encoding="utf-8") as places:

        def written(name: str, line: int, text: str) -> str:
            places.write(json.dumps([name, line]) + "\n")
            return text

        HeldOut.load(Path(order["held_out"])).shared_with(starmap(written, problems)).save(result / NGRAMS)


def pairs(order: Mapping[str, Any], result: Path) -> None:
    """The near-duplicates in a piece, whose n-grams are in folder ``piece``: ``counts`` is a file of how many problems
    of all ``number`` have each n-gram."""
    piece = Path(order["piece"])
    comparison = Comparer(HeldOut.load(Path(order["held_out"])), np.load(order["counts"]), order["number"])
    places = [place for _, place in parse_lines(piece / PLACES)]
    rows = (
        [left, *places[left], right, similarity]
        for left, right, similarity in comparison.pairs(Shared.load(piece / NGRAMS), TWIN_SIMILARITY)
    )
    with (result / PAIRS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
