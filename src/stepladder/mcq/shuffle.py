"""Seeded orders of the options, and the way back."""

from __future__ import annotations

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
    """``count`` orders of ``size`` options, distinct until all of them are used; never the original order first
    when shuffling is asked for, since a label's place must not help.

    Two-option questions have two orders only; asking for more repeats them.
    """
    draw = rng(*seed)
    seen: list[Permutation] = []
    while len(seen) < count:
        order = tuple(draw.sample(range(size), size))
        if order not in seen or len(set(seen)) == _factorial_capped(size):
            seen.append(order)
    return seen


def _factorial_capped(size: int) -> int:
    total = 1
    for factor in range(2, min(size, 5) + 1):
        total *= factor
    return total


def shown(items: Sequence[str], permutation: Permutation) -> list[str]:
    """The options in the order they are shown."""
    return [items[index] for index in permutation]


def to_shown(letter: str, permutation: Permutation) -> str:
    """Original letter -> the letter it is shown as."""
    return LETTERS[permutation.index(LETTERS.index(letter))]


def to_original(letter: str, permutation: Permutation) -> str:
    """Shown letter -> original letter."""
    return LETTERS[permutation[LETTERS.index(letter)]]
