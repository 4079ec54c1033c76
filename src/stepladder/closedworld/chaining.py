"""Rule chaining with negation as failure: whoever is kind and not tall is wise; whoever is wise is rich; is Ann rich?

Level 1 is one rule with an exception; levels 2 and 3 add a second and a third rule on top.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import NAMES, TRAITS, Phrase, join, say, sentences, word
from stepladder.closedworld.world import Mistake, Query, World

AND: Phrase = {"en": " and ", "zh": "且"}
FACT: Phrase = {"en": "{p} is {facts}.", "zh": "{p}{facts}。"}
PLAIN: Phrase = {"en": "Whoever is {needs} is {gives}.", "zh": "如果一个人{needs}，他就{gives}。"}
EXCEPT: Phrase = {
    "en": "Whoever is {needs} and not {bars} is {gives}.",
    "zh": "如果一个人{needs}且不{bars}，他就{gives}。",
}
IS: Phrase = {"en": "Is {p} {goal}?", "zh": "{p}{goal}吗？"}
HOLDS: Phrase = {"en": "{what}: yes.", "zh": "{what}：是。"}
FAILS: Phrase = {"en": "{what}: no.", "zh": "{what}：否。"}


@dataclass(frozen=True)
class Link:
    """Whoever is `needs`, and not `bars` if there is one, is `gives`."""

    needs: str
    bars: str | None
    gives: str

    @property
    def rule(self) -> Rule:
        body = ("person(P)", f"is(P,{self.needs})")
        return Rule(f"is(P,{self.gives})", body if self.bars is None else (*body, f"not is(P,{self.bars})"))

    @property
    def sentence(self) -> Phrase:
        if self.bars is None:
            return say(PLAIN, needs=self.needs, gives=self.gives)
        return say(EXCEPT, needs=self.needs, bars=self.bars, gives=self.gives)


def build(draw: Random, level: int) -> World:
    cause, bar, other, *gives = draw.sample(sorted(TRAITS), 3 + level)
    links = [Link(cause, bar, gives[0]), *(Link(needs, None, given) for needs, given in pairwise(gives))]
    goal = gives[-1]
    people = {person: _facts(draw, cause, bar, other) for person in draw.sample(sorted(NAMES), 3)}

    facts = [Rule(f"person({person})") for person in people]
    facts += [Rule(f"is({person},{fact})") for person, stated in people.items() for fact in stated]
    rules = (*facts, *(link.rule for link in links))
    told = {person: say(FACT, p=person, facts=_listed(stated)) for person, stated in people.items()}
    story = sentences([*told.values(), *(link.sentence for link in links)])

    holders = [person for person, stated in people.items() if witness(stated, links, goal)]
    asked = draw.sample(sorted(people), 3)
    queries = [_is(rules, links, person, goal, told[person], person in holders) for person in asked]
    return World(rules, story, tuple(queries))


def witness(stated: list[str], links: list[Link], goal: str) -> bool:
    """Whether somebody with these facts reaches the goal; the links come in the order they build on one another."""
    known = set(stated)
    for link in links:
        if link.needs in known and link.bars not in known:
            known.add(link.gives)
    return goal in known


def _facts(draw: Random, cause: str, bar: str, other: str) -> list[str]:
    """One or two facts that lead to the goal about half the time, and mostly fail for the interesting reason."""
    reaching = [[cause], [cause, other]]
    barred = [[cause, bar]]
    missing = [[other], [bar], [bar, other]]
    return draw.choice(reaching if draw.random() < 0.5 else draw.choice([barred, missing]))


def _listed(words: list[str]) -> Phrase:
    return join([word(fact) for fact in words], AND)


def _is(rules: tuple[Rule, ...], links: list[Link], person: str, goal: str, told: Phrase, holds: bool) -> Query:
    asks = (Rule("answer(yes)", (f"is({person},{goal})",)), Rule("answer(no)", ("not answer(yes)",)))

    def worked(derivation: Derivation) -> Phrase:
        return sentences([told, *_steps(derivation, person, goal)])

    return Query(say(IS, p=person, goal=goal), asks, "yes" if holds else "no", _mistakes(rules, links, asks), 2, worked)


def _steps(derivation: Derivation, person: str, goal: str) -> list[Phrase]:
    return [
        say(HOLDS if finding.holds else FAILS, what=str(finding.atom.arguments[1]))
        for finding in derivation.path(f"is({person},{goal})")
        if finding.atom.match("is", 2)
    ]


def _mistakes(rules: tuple[Rule, ...], links: list[Link], asks: tuple[Rule, ...]) -> tuple[Mistake, ...]:
    """How a rule is misread: its exception forgotten or turned round, its condition forgotten, all of it forgotten."""
    mistakes: list[Mistake] = []
    for link in links:
        right = link.rule
        person, needs, *exception = right.body
        wrong: dict[str, list[Rule]] = {}
        if exception:
            wrong["forgets the exception of"] = [replace(right, body=(person, needs))]
            wrong["overlooks the not in"] = [replace(right, body=(person, needs, exception[0].removeprefix("not ")))]
        wrong["forgets the condition of"] = [replace(right, body=(person, *exception))]
        wrong["forgets the rule"] = []
        mistakes += [
            Mistake(f"{reason} {right}", (*(r for r in rules if r != right), *instead, *asks))
            for reason, instead in wrong.items()
        ]
    return tuple(mistakes)
