"""What a closed-world problem is, before anyone has chosen options for it.

A family is a module with `build(draw, level) -> World`: it draws a small situation and writes it down twice, as a
logic program and as text in every language. It does not say which option is right: clingo does. What it knows in
plain Python goes into `Query.witness`, a second opinion that the generator compares with the proof.

`Query.asks` are rules that define `answer/1`; an option is one term of `answer`. A wrong option is never invented: it
is an `answer` of one of the `mistakes`, each of them the whole program as a careless reader would understand it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import Phrase

LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Mistake:
    """A slightly wrong program: the world's rules and the query's, as somebody misread them."""

    reason: str
    program: tuple[Rule, ...]


@dataclass(frozen=True)
class Query:
    """One sub-question on a world."""

    question: Phrase
    asks: tuple[Rule, ...]
    witness: str
    mistakes: tuple[Mistake, ...]
    options: int
    """How many options to offer, if the mistakes give that many different answers."""
    worked: Callable[[Derivation], Phrase]
    """The chain without its last line, which is the right option's text."""


@dataclass(frozen=True)
class World:
    """One problem: its program, its text, and what is asked about it."""

    rules: tuple[Rule, ...]
    story: Phrase
    queries: tuple[Query, ...]


class Family(Protocol):
    """A module that draws worlds of one kind."""

    def build(self, draw: Random, level: int) -> World: ...
