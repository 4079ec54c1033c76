"""Two buttons that change the number on a display: one adds, the other subtracts.

Level n has n presses. The numbers stay small, because the student is to reason, not to add.
"""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import COLOURS, DEVICES, NAMES, Phrase, join, say, sentences
from stepladder.closedworld.world import Mistake, Query, World

OWNER: Phrase = {"en": "{p} has a {d} with a number.", "zh": "{p}有一个带数字的{d}。"}
BUTTONS: Phrase = {"en": "Button {up} adds {a}. Button {down} takes {b}.", "zh": "{up}键加{a}。{down}键减{b}。"}
PRESS_QUESTION: Phrase = {
    "en": "The number is {s}. Press {presses}. What is the number now?",
    "zh": "数字是{s}。依次按{presses}。现在数字是几？",
}
PRESS: Phrase = {"en": "{n} {button}", "zh": "{n}{button}"}
COMMA: Phrase = {"en": ", ", "zh": "，"}
ADDS: Phrase = {"en": "{n} {button} adds {d}: {x} + {d} = {y}.", "zh": "{n}{button}键加{d}：{x}+{d}={y}。"}
TAKES: Phrase = {"en": "{n} {button} takes {d}: {x} - {d} = {y}.", "zh": "{n}{button}键减{d}：{x}-{d}={y}。"}
STARTS = range(6, 13)
UPS = range(2, 6)
DOWNS = range(1, 3)  # so small that three presses of the smallest start leave a number above zero
Effects = dict[str, int]
"""For each button what it adds to the number."""


def build(draw: Random, level: int) -> World:
    up, down = draw.sample(sorted(COLOURS), 2)
    plus, minus = draw.choice(UPS), draw.choice(DOWNS)
    owner = say(OWNER, p=draw.choice(sorted(NAMES)), d=draw.choice(sorted(DEVICES)))
    story = sentences([owner, say(BUTTONS, up=up, a=plus, down=down, b=minus)])
    effects = {up: plus, down: -minus}
    queries = [_query(draw, effects, start, draw.choices([up, down], k=level)) for start in draw.sample(STARTS, 3)]
    return World(_program(effects), story, tuple(queries))


def witness(start: int, presses: Sequence[str], effects: Effects) -> int:
    """The number after the presses."""
    return start + sum(effects[button] for button in presses)


def _program(effects: Effects) -> tuple[Rule, ...]:
    changes = tuple(Rule(f"change({button},{by})") for button, by in effects.items())
    return (*changes, Rule("value(T+1,X+D)", ("value(T,X)", "press(T+1,B)", "change(B,D)")))


def _query(draw: Random, effects: Effects, start: int, presses: list[str]) -> Query:
    def asks(pressed: Sequence[str]) -> tuple[Rule, ...]:
        pushed = (Rule(f"press({n},{button})") for n, button in enumerate(pressed, 1))
        return (Rule(f"value(0,{start})"), *pushed, Rule("answer(X)", (f"value({len(pressed)},X)",)))

    def wrong(reason: str, pressed: Sequence[str], by: Effects) -> Mistake:
        return Mistake(reason, (*_program(by), *asks(pressed)))

    def worked(derivation: Derivation) -> Phrase:
        path = derivation.path(f"value({len(presses)},{derivation.answers[0]})")
        values = [checked.atom.arguments[1].number for checked in path if checked.atom.match("value", 2)]
        return sentences(_steps(presses, values))

    (up, plus), (down, minus) = effects.items()
    other = {up: down, down: up}
    mistakes = [
        wrong("presses the last button twice", [*presses, presses[-1]], effects),
        wrong("mistakes the last button for the other", [*presses[:-1], other[presses[-1]]], effects),
        wrong("mistakes the first button for the other", [other[presses[0]], *presses[1:]], effects),
        wrong("always adds", presses, {up: plus, down: -minus}),
        wrong("swaps the buttons", presses, {up: minus, down: plus}),
        wrong("adds one too many", presses, {up: plus + 1, down: minus}),
        wrong("takes one too many", presses, {up: plus, down: minus - 1}),
    ]
    if len(presses) > 1:
        mistakes.append(wrong("forgets the last press", presses[:-1], effects))
    draw.shuffle(mistakes)
    listed = join([say(PRESS, n=n, button=button) for n, button in enumerate(presses, 1)], COMMA)
    question = say(PRESS_QUESTION, s=start, presses=listed)
    return Query(question, asks(presses), str(witness(start, presses, effects)), tuple(mistakes), 4, worked)


def _steps(presses: list[str], values: list[int]) -> list[Phrase]:
    return [
        say(ADDS if x < y else TAKES, n=n, button=button, x=x, d=abs(y - x), y=y)
        for n, (button, (x, y)) in enumerate(zip(presses, pairwise(values), strict=True), 1)
    ]
