"""A closed-world problem before its options are chosen.

A family is a module with `build(draw, level) -> World`: it draws a small situation and writes it twice, as a logic
program and as text in every language. Which option is right is decided by clingo; `Query.witness` is the answer
computed in plain Python, which the generator compares with the proof.

`Query.asks` are rules that define `answer/1`; an option is one term of `answer`. Every wrong option is an `answer` of
one of the `mistakes`, each of which is the whole program as a careless reader would understand it.
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
    """A misread program: the world's and the query's rules with a mistake. `reason` completes "a reader who ..."."""

    reason: str
    program: tuple[Rule, ...]


@dataclass(frozen=True)
class Query:
    """One question about a world; `witness` is the id of the expected answer."""

    question: Phrase
    asks: tuple[Rule, ...]
    witness: str
    mistakes: tuple[Mistake, ...]
    options: int
    """Number of options, fewer if the mistakes give fewer different answers."""
    worked: Callable[[Derivation], Phrase]
    """Makes the worked solution from the derivation, without its last line (the right option's text)."""


@dataclass(frozen=True)
class World:
    """One problem: its program, its text, and what is asked about it."""

    rules: tuple[Rule, ...]
    story: Phrase
    queries: tuple[Query, ...]


class Family(Protocol):
    """A module that draws worlds of one kind."""

    def build(self, draw: Random, level: int) -> World: ...
