"""One small function used again and again: what it does depends on whether the number is under ten.

Level n uses it n times. Numbers stay below twenty: the student is to reason, not to add.
"""

from itertools import pairwise
from random import Random

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import DEVICES, NAMES, Phrase, say, sentences
from stepladder.closedworld.world import LEVELS, Mistake, Query, World

OWNER: Phrase = {"en": "{p} has a {d}.", "zh": "{p}有一个{d}。"}
RULES: Phrase = {
    "en": "A number under 10 gets plus {a}. Any other number gets minus {b}.",
    "zh": "小于10的数加{a}，其他的数减{b}。",
}
RUN: Phrase = {
    "en": "Start with {s} and use the {d} {k} times. What comes out?",
    "zh": "从{s}开始，用{d}{k}次，结果是多少？",
}
RUN_ONCE: Phrase = {
    "en": "Start with {s} and use the {d} 1 time. What comes out?",
    "zh": "从{s}开始，用{d}1次，结果是多少？",
}
# A step says how many there are, so that where to stop can be read and need not be counted.
UP: Phrase = {"en": "{n}/{k}: {x} is under 10, {x} + {d} = {y}.", "zh": "{n}/{k}：{x}小于10，{x}+{d}={y}。"}
DOWN: Phrase = {"en": "{n}/{k}: {x} is not, {x} - {d} = {y}.", "zh": "{n}/{k}：{x}不小于10，{x}-{d}={y}。"}
LIMIT = 10
STARTS = range(5, 15)
UPS = range(3, 8)
DOWNS = range(2, 6)


def build(draw: Random, level: int) -> World:
    plus, minus = draw.choice(UPS), draw.choice(DOWNS)
    device = draw.choice(sorted(DEVICES))
    owner = say(OWNER, p=draw.choice(sorted(NAMES)), d=device)
    story = sentences([owner, say(RULES, a=plus, b=minus)])
    starts = draw.sample(STARTS, 3)
    return World(_program(plus, minus), story, tuple(_run(draw, device, plus, minus, s, level) for s in starts))


def witness(start: int, times: int, plus: int, minus: int) -> int:
    """What comes out after so many times."""
    number = start
    for _ in range(times):
        number += plus if number < LIMIT else -minus
    return number


def _program(plus: int, minus: int) -> tuple[Rule, ...]:
    # Two steps more than any question needs, because too many is a mistake somebody may make.
    more = f"T <= {max(LEVELS) + 2}"
    return (
        Rule(f"value(T+1,X+{plus})", ("value(T,X)", f"X < {LIMIT}", more)),
        Rule(f"value(T+1,X-{minus})", ("value(T,X)", f"X >= {LIMIT}", more)),
    )


def _run(draw: Random, device: str, plus: int, minus: int, start: int, times: int) -> Query:
    def asks(count: int) -> tuple[Rule, ...]:
        return (Rule(f"value(0,{start})"), Rule("answer(X)", (f"value({count},X)",)))

    def worked(derivation: Derivation) -> Phrase:
        path = derivation.path(f"value({times},{derivation.answers[0]})")
        values = [finding.atom.arguments[1].number for finding in path if finding.atom.match("value", 2)]
        return sentences(_steps(values))

    right = _program(plus, minus)
    up, down = right
    mistakes = [
        Mistake("stops one step too early", (*right, *asks(times - 1))),
        Mistake("takes one step too many", (*right, *asks(times + 1))),
        Mistake("takes two steps too many", (*right, *asks(times + 2))),
        Mistake("always adds", (up, Rule(f"value(T+1,X+{plus})", (*down.body,)), *asks(times))),
        Mistake("adds one too many", (*_program(plus + 1, minus), *asks(times))),
        Mistake("takes away one too many", (*_program(plus, minus + 1), *asks(times))),
    ]
    draw.shuffle(mistakes)
    question = say(RUN if times > 1 else RUN_ONCE, s=start, d=device, k=times)
    result = str(witness(start, times, plus, minus))
    return Query(question, asks(times), result, tuple(mistakes), 4, worked)


def _steps(values: list[int]) -> list[Phrase]:
    times = len(values) - 1
    return [
        say(UP if x < y else DOWN, n=n, k=times, x=x, d=abs(y - x), y=y) for n, (x, y) in enumerate(pairwise(values), 1)
    ]
