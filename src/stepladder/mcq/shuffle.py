"""Seeded orders of the options, and mapping letters to and from them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from stepladder.records import LETTERS, Question
from stepladder.workspace import digest

_REFERS_TO_OTHERS = re.compile(
    r"(?:所有)?(?:以上|上述|前面|前述)[^，。；]*+"
    r"|(?:两者|二者|两个|三者)?(?:都|皆|均|全)(?:不)?(?:是|非|对|可以|正确|成立)(?:的)?"
    r"|所有(?:上述|以上|选项|答案).*"
    r"|(?:none|all|both|neither|any)(?:\s++of)?(?:\s++(?:the|these|those|them))?"
    r"(?:\s++(?:above|options?|answers?|choices|statements|two))*+(?:\s++(?:is|are)\s++(?:true|false|correct|right|wrong))?"
    r"|无(?:法)?以上|以上",
    re.IGNORECASE,
)
_LETTER_NAMED = (
    r"(?:选项|答案)\s*+[{letters}](?![A-Za-z])|\b(?:[Oo]ptions?|[Cc]hoices?|[Aa]nswers?)\s++\(?[{letters}]\b"
)
_LETTERS_JOINED = (
    r"(?<![A-Za-z])[{letters}]\s*+(?:和|与|及|、|或)\s*+[{letters}](?![A-Za-z])"
    r"|\b(?:[Bb]oth|[Ee]ither|[Nn]either)\s++[{letters}]\s++(?:and|or|nor)\s++[{letters}]\b"
    r"|^\(?[{letters}]\)?\s*+(?:and|or|&)\s*+\(?[{letters}]\)?$"
)

Permutation = tuple[int, ...]
"""``permutation[i]`` is the original index of the option shown as letter i."""


def rng(*parts: object) -> random.Random:
    """A random generator seeded with what it is for, so that draws do not depend on the order they are made in."""
    return random.Random(digest([str(part) for part in parts]))


class Fixed(NamedTuple):
    """Indices of the options that must stay in place when the others are shuffled, and why."""

    places: frozenset[int] = frozenset()
    reason: str = ""


def fixed(question: Question) -> Fixed:
    """Which options of a question may not move.

    An option that refers to the others ("none of the above", "以上都是") stays in its place at the end; if it is in the
    middle, all options stay in theirs. If the question or an option names options by letter ("A and B", "选项C"), or an
    option is itself a letter, none may move.
    """
    letters = f"A-{LETTERS[len(question.options) - 1]}"
    named, joined = (re.compile(pattern.format(letters=letters)) for pattern in (_LETTER_NAMED, _LETTERS_JOINED))
    # Only options are checked for "A and B": a question may be about people called A and B.
    if any(map(named.search, (question.question, *question.options))) or any(map(joined.search, question.options)):
        return Fixed(frozenset(range(len(question.options))), "options are named by their letters")
    if any(re.fullmatch(f"[{letters}]", option) for option in question.options):
        return Fixed(frozenset(range(len(question.options))), "options are letters themselves")
    places = frozenset(
        place for place, option in enumerate(question.options) if _REFERS_TO_OTHERS.fullmatch(option.strip(" 。."))
    )
    if places and any(place > min(places) for place in range(len(question.options)) if place not in places):
        return Fixed(frozenset(range(len(question.options))), "an option in the middle speaks of those above it")
    return Fixed(places, "an option speaks of the others" if places else "")


def orders(count: int, size: int, *seed: object, places: frozenset[int] = frozenset()) -> list[Permutation]:
    """``count`` random orders of ``size`` options, seeded with ``seed``; the indices ``places`` stay where they are.

    The orders are distinct as long as there are enough: more than two orders of two options repeat.
    """
    draw = rng(*seed)
    free = [place for place in range(size) if place not in places]
    drawn: list[Permutation] = []
    while len(drawn) < count:
        moved = dict(zip(free, draw.sample(free, len(free)), strict=True))
        order = tuple(moved.get(place, place) for place in range(size))
        if order not in drawn or len(drawn) >= math.factorial(len(free)):
            drawn.append(order)
    return drawn


def shown(items: Sequence[str], permutation: Permutation) -> list[str]:
    """The items in the order they are shown."""
    return [items[index] for index in permutation]


def to_shown(letter: str, permutation: Permutation) -> str:
    """Original letter -> the letter it is shown as."""
    return LETTERS[permutation.index(LETTERS.index(letter))]


def to_original(letter: str, permutation: Permutation) -> str:
    """Shown letter -> original letter."""
    return LETTERS[permutation[LETTERS.index(letter)]]
