"""Rule chaining with negation as failure: whoever is kind is shy, unless wise; whoever is shy is rich.

Level 1 is one rule with an exception; levels 2 and 3 add a second and a third rule. Every fact about a person is used
by some rule, so that a chain can follow each fact to what it leads to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import NAMES, TRAITS, Phrase, join, say, sentences, word
from stepladder.closedworld.world import Mistake, Query, World

AND: Phrase = {"en": " and ", "zh": "且"}
FACT: Phrase = {"en": "{p} is {facts}.", "zh": "{p}{facts}。"}
RULE: Phrase = {"en": "Whoever is {needs} is {gives}.", "zh": "{needs}的人{gives}。"}
EXCEPTION: Phrase = {"en": "Exception: whoever is {bars} is not {gives}.", "zh": "例外：{bars}的人不{gives}。"}
IS_QUESTION: Phrase = {"en": "Is {p} {goal}?", "zh": "{p}{goal}吗？"}
LEADS: Phrase = {"en": "{fact} is {gives}.", "zh": "{fact}的人{gives}。"}
BARS: Phrase = {"en": "{fact} is not {gives}.", "zh": "{fact}的人不{gives}。"}
HOLDS: Phrase = {"en": "{goal}: yes.", "zh": "{goal}：是。"}
FAILS: Phrase = {"en": "{goal}: no.", "zh": "{goal}：否。"}


@dataclass(frozen=True)
class Link:
    """The rule that whoever is `needs` is `gives`, unless they are `bars` (None: no exception)."""

    needs: str
    bars: str | None
    gives: str

    @property
    def rule(self) -> Rule:
        body = ("person(P)", f"is(P,{self.needs})")
        return Rule(f"is(P,{self.gives})", body if self.bars is None else (*body, f"not is(P,{self.bars})"))

    @property
    def statement(self) -> Phrase:
        rule = say(RULE, needs=self.needs, gives=self.gives)
        if self.bars is None:
            return rule
        return sentences([rule, say(EXCEPTION, bars=self.bars, gives=self.gives)])


def build(draw: Random, level: int) -> World:
    cause, bar, other, aside, *gives = draw.sample(sorted(TRAITS), 4 + level)
    chain = [Link(cause, bar, gives[0]), *(Link(needs, None, conclusion) for needs, conclusion in pairwise(gives))]
    links = (*chain, Link(other, None, aside))
    people = {person: _facts(draw, cause, bar, other) for person in draw.sample(sorted(NAMES), 3)}

    facts = [Rule(f"person({person})") for person in people]
    facts += [Rule(f"is({person},{fact})") for person, stated in people.items() for fact in stated]
    rules = (*facts, *(link.rule for link in links))
    statement = {person: say(FACT, p=person, facts=_joined(stated)) for person, stated in people.items()}
    story = sentences([*statement.values(), *(link.statement for link in links)])
    queries = [_query(rules, links, person, stated, statement[person], gives[-1]) for person, stated in people.items()]
    return World(rules, story, tuple(queries))


def witness(stated: list[str], links: list[Link], goal: str) -> bool:
    """Whether the goal holds for a person with these facts; each link may only need what links before it give."""
    traits = set(stated)
    for link in links:
        if link.needs in traits and link.bars not in traits:
            traits.add(link.gives)
    return goal in traits


def _facts(draw: Random, cause: str, bar: str, other: str) -> list[str]:
    """One or two facts, which lead to the goal in half of the draws."""
    reaching = [[cause], [other, cause]]
    failing = [[cause, bar], [cause, bar], [other], [bar], [other, bar]]
    return draw.choice(reaching if draw.random() < 0.5 else failing)


def _joined(words: list[str]) -> Phrase:
    return join([word(fact) for fact in words], AND)


def _query(
    rules: tuple[Rule, ...], links: tuple[Link, ...], person: str, stated: list[str], statement: Phrase, goal: str
) -> Query:
    asks = (Rule("answer(yes)", (f"is({person},{goal})",)), Rule("answer(no)", ("not answer(yes)",)))

    def worked(derivation: Derivation) -> Phrase:
        model = {str(atom) for atom in derivation.atoms}
        steps = [step for fact in stated for step in _consequences(model, links, person, fact)]
        verdict = HOLDS if f"is({person},{goal})" in model else FAILS
        return sentences([statement, *steps, say(verdict, goal=goal)])

    holds = witness(stated, list(links), goal)
    return Query(
        say(IS_QUESTION, p=person, goal=goal), asks, "yes" if holds else "no", _mistakes(rules, links, asks), 2, worked
    )


def _consequences(model: set[str], links: tuple[Link, ...], person: str, fact: str) -> Iterator[Phrase]:
    """Steps for one fact: what it bars, the rules that need it and, where they fired, the steps for what they give."""
    for link in links:
        if link.bars == fact:
            yield say(BARS, fact=fact, gives=link.gives)
        if link.needs == fact:
            yield say(LEADS, fact=fact, gives=link.gives)
            if f"is({person},{link.gives})" in model:
                yield from _consequences(model, links, person, link.gives)


def _mistakes(rules: tuple[Rule, ...], links: tuple[Link, ...], asks: tuple[Rule, ...]) -> tuple[Mistake, ...]:
    """Misreadings of each rule: its exception is forgotten or inverted, its condition or all of it is forgotten."""
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
