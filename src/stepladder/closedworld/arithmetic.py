"""One small function used again and again: what is added depends on whether the number is even or odd.

Level n uses it n times. Numbers stay below 41 on the way to the answer.
"""

from itertools import pairwise
from random import Random

import clingo

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import DEVICES, NAMES, Phrase, say, sentences
from stepladder.closedworld.world import LEVELS, Mistake, Query, World

OWNER: Phrase = {"en": "{p} has a {d}.", "zh": "{p}有一个{d}。"}
RULES: Phrase = {"en": "An even number gets plus {a}. An odd number gets plus {b}.", "zh": "偶数加{a}，奇数加{b}。"}
RUN: Phrase = {
    "en": "Start with {s} and use the {d} {k} times. What comes out?",
    "zh": "从{s}开始，用{d}{k}次，结果是多少？",
}
STEP: dict[str, Phrase] = {
    "even": {"en": "{x} is even: {x} + {d} = {y}.", "zh": "{x}是偶数：{x}+{d}={y}。"},
    "odd": {"en": "{x} is odd: {x} + {d} = {y}.", "zh": "{x}是奇数：{x}+{d}={y}。"},
}
LARGEST_START = 9
LARGEST = 40


def build(draw: Random, level: int) -> World:
    even, odd = draw.sample(range(1, min(9, (LARGEST - LARGEST_START) // (max(LEVELS) + 1)) + 1), 2)
    device = draw.choice(sorted(DEVICES))
    owner = say(OWNER, p=draw.choice(sorted(NAMES)), d=device)
    story = sentences([owner, say(RULES, a=even, b=odd)])
    starts = draw.sample(range(1, LARGEST_START + 1), 3)
    return World(_program(even, odd), story, tuple(_run(draw, device, even, odd, start, level) for start in starts))


def witness(start: int, times: int, even: int, odd: int) -> int:
    """What comes out after so many times."""
    number = start
    for _ in range(times):
        number += odd if number % 2 else even
    return number


def _program(even: int, odd: int) -> tuple[Rule, ...]:
    # One step more than any question needs, because one too many is a mistake somebody may make.
    more = f"T <= {max(LEVELS) + 1}"
    return (
        Rule("even(X)", ("value(T,X)", "X \\ 2 = 0")),
        Rule("odd(X)", ("value(T,X)", "X \\ 2 = 1")),
        Rule(f"value(T+1,X+{even})", ("value(T,X)", "even(X)", more)),
        Rule(f"value(T+1,X+{odd})", ("value(T,X)", "odd(X)", more)),
    )


def _run(draw: Random, device: str, even: int, odd: int, start: int, times: int) -> Query:
    def asks(count: int) -> tuple[Rule, ...]:
        return (Rule(f"value(0,{start})"), Rule("answer(X)", (f"value({count},X)",)))

    def worked(derivation: Derivation) -> Phrase:
        return sentences(
            _steps([finding.atom for finding in derivation.path(f"value({times},{derivation.answers[0]})")])
        )

    right = _program(even, odd)
    mistakes = [
        Mistake("stops one step too early", (*right, *asks(times - 1))),
        Mistake("takes one step too many", (*right, *asks(times + 1))),
        Mistake("swaps even and odd", (*_program(odd, even), *asks(times))),
        Mistake("always uses the rule for even numbers", (*_program(even, even), *asks(times))),
        Mistake("always uses the rule for odd numbers", (*_program(odd, odd), *asks(times))),
    ]
    draw.shuffle(mistakes)
    question = say(RUN, s=start, d=device, k=times)
    result = str(witness(start, times, even, odd))
    return Query(question, asks(times), result, tuple(mistakes), 4, worked)


def _steps(path: list[clingo.Symbol]) -> list[Phrase]:
    """The path alternates a value, what kind it is, and the next value."""
    values = [atom.arguments[1].number for atom in path if atom.match("value", 2)]
    kinds = [atom.name for atom in path if atom.match("even", 1) or atom.match("odd", 1)]
    return [say(STEP[kind], x=x, d=y - x, y=y) for kind, (x, y) in zip(kinds, pairwise(values), strict=True)]
