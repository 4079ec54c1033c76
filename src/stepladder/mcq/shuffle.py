"""Seeded orders of the options, and the way back."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from stepladder.records import LETTERS
from stepladder.workspace import digest

Permutation = tuple[int, ...]
"""``permutation[i]`` is the original index of the option shown as letter i."""


def rng(*parts: object) -> random.Random:
    """A generator seeded by what the choice is for, never by when it is made."""
    return random.Random(digest([str(part) for part in parts]))


def orders(count: int, size: int, *seed: object) -> list[Permutation]:
    """``count`` orders of ``size`` options, drawn by ``seed``, distinct until there is none left: two options have
    two orders only, and asking for more repeats them."""
    draw = rng(*seed)
    drawn: list[Permutation] = []
    while len(drawn) < count:
        order = tuple(draw.sample(range(size), size))
        if order not in drawn or len(drawn) >= math.factorial(size):
            drawn.append(order)
    return drawn


def shown(items: Sequence[str], permutation: Permutation) -> list[str]:
    """The options in the order they are shown."""
    return [items[index] for index in permutation]


def to_shown(letter: str, permutation: Permutation) -> str:
    """Original letter -> the letter it is shown as."""
    return LETTERS[permutation.index(LETTERS.index(letter))]


def to_original(letter: str, permutation: Permutation) -> str:
    """Shown letter -> original letter."""
    return LETTERS[permutation[LETTERS.index(letter)]]
