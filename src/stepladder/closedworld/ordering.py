"""A line of people, described by shuffled clues "Ann, then Bob." and by who is first.

Levels 1, 2 and 3 have three, four and five people.
"""

from dataclasses import dataclass
from itertools import pairwise
from random import Random

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import NAMES, Phrase, join, say, sentences, word
from stepladder.closedworld.world import Mistake, Query, World

FIRST: Phrase = {"en": "{p} is first.", "zh": "{p}第一。"}
CLUE: Phrase = {"en": "{p}, then {q}.", "zh": "{p}，然后{q}。"}
THEN: Phrase = {"en": ", then ", "zh": "，然后"}
PLACE: Phrase = {"en": "{n} {p}", "zh": "{n}{p}"}
COMMA: Phrase = {"en": ", ", "zh": "，"}
STOP: Phrase = {"en": "{text}.", "zh": "{text}。"}
AHEAD: Phrase = {"en": "Is {p} ahead of {q}?", "zh": "{p}在{q}前面吗？"}

# at/2 counts places from the first person. Read from the back, the same clues are used in the other direction.
FORWARD = Rule("at(B,N+1)", ("at(A,N)", "behind(A,B)"))
BACKWARD = Rule("at(A,N+1)", ("at(B,N)", "behind(A,B)"))


@dataclass(frozen=True)
class Scene:
    """The opening sentence, and the questions for a numbered place and for the last."""

    opening: Phrase
    place: Phrase
    last: Phrase


SCENES = (
    Scene(
        {"en": "{n} people stand in line.", "zh": "{n}个人排队。"},
        {"en": "Who is number {n} in line?", "zh": "谁排在第{n}位？"},
        {"en": "Who is last in line?", "zh": "谁排在最后？"},
    ),
    Scene(
        {"en": "{n} friends run a race.", "zh": "{n}个朋友赛跑。"},
        {"en": "Who is number {n} in the race?", "zh": "谁跑在第{n}位？"},
        {"en": "Who is last in the race?", "zh": "谁跑在最后？"},
    ),
    Scene(
        {"en": "{n} kids walk up a hill.", "zh": "{n}个孩子爬山。"},
        {"en": "Who is number {n} on the hill?", "zh": "谁走在第{n}位？"},
        {"en": "Who is last on the hill?", "zh": "谁走在最后？"},
    ),
    Scene(
        {"en": "{n} students sit in a row.", "zh": "{n}名学生坐成一列。"},
        {"en": "Who is number {n} in the row?", "zh": "谁坐在第{n}位？"},
        {"en": "Who is last in the row?", "zh": "谁坐在最后？"},
    ),
)


@dataclass(frozen=True)
class Line:
    """Who is first, and the clues (person, person behind) in the order of the text."""

    first: str
    clues: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> tuple[Rule, ...]:
        return tuple(Rule(f"behind({ahead},{behind})") for ahead, behind in self.clues)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(f"at({self.first},1)"), *self.facts, FORWARD)

    def misread(self, asks: tuple[Rule, ...]) -> tuple[Mistake, ...]:
        """Mistakes of readers who count from the wrong end, or take the clues in the order of the text."""
        last = witness(self.first, dict(self.clues))[-1]
        in_text_order = tuple(Rule(f"at({behind},{number})") for number, (_, behind) in enumerate(self.clues, 2))
        return (
            Mistake("takes the clues in the order told", (Rule(f"at({self.first},1)"), *in_text_order, *asks)),
            Mistake("counts from the back", (Rule(f"at({last},1)"), *self.facts, BACKWARD, *asks)),
        )


def build(draw: Random, level: int) -> World:
    scene = draw.choice(SCENES)
    people = draw.sample(sorted(NAMES), 2 + level)
    clues = list(pairwise(people))
    draw.shuffle(clues)
    line = Line(people[0], tuple(clues))
    story = sentences(
        [
            say(scene.opening, n=len(people)),
            say(FIRST, p=line.first),
            *(say(CLUE, p=ahead, q=behind) for ahead, behind in line.clues),
        ]
    )
    places = draw.sample(range(1, len(people) + 1), 3)
    queries = [_place_query(draw, scene, line, number) for number in places[:2]]
    queries.append(_ahead_query(draw, line) if draw.random() < 0.5 else _place_query(draw, scene, line, places[2]))
    return World(line.rules, story, tuple(queries))


def witness(first: str, behind: dict[str, str]) -> list[str]:
    """Everybody in line, front to back, from the first person and who stands behind whom."""
    line = [first]
    while line[-1] in behind:
        line.append(behind[line[-1]])
    return line


def _place_query(draw: Random, scene: Scene, line: Line, number: int) -> Query:
    order = witness(line.first, dict(line.clues))
    last = number == len(order) and draw.random() < 0.5

    def asks(place: int) -> tuple[Rule, ...]:
        return (Rule("answer(X)", (f"at(X,{place})",)),)

    def worked(derivation: Derivation) -> Phrase:
        places = _places(derivation)
        return sentences([_line_in_order(places), _line_numbered(places, number)])

    miscounts = (
        Mistake("counts one too few", (*line.rules, *asks(number - 1))),
        Mistake("counts one too many", (*line.rules, *asks(number + 1))),
    )
    mistakes = [*miscounts, *line.misread(asks(number))]
    draw.shuffle(mistakes)
    question = scene.last if last else say(scene.place, n=number)
    return Query(question, asks(number), order[number - 1], tuple(mistakes), draw.choice((3, 4, 4, 4)), worked)


def _ahead_query(draw: Random, line: Line) -> Query:
    order = witness(line.first, dict(line.clues))
    first, second = draw.sample(order, 2)
    asks = (
        Rule("answer(yes)", (f"at({first},M)", f"at({second},N)", "M < N")),
        Rule("answer(no)", ("not answer(yes)",)),
    )

    def worked(derivation: Derivation) -> Phrase:
        places = _places(derivation)
        later = max(place for place, person in places.items() if person in (first, second))
        return sentences([_line_in_order(places), _line_numbered(places, later)])

    holds = order.index(first) < order.index(second)
    return Query(say(AHEAD, p=first, q=second), asks, "yes" if holds else "no", line.misread(asks), 2, worked)


def _places(derivation: Derivation) -> dict[int, str]:
    """Person by place number, in the order of the derivation of the last place."""
    end = max((atom for atom in derivation.atoms if atom.match("at", 2)), key=lambda atom: atom.arguments[1].number)
    passed = [checked.atom.arguments for checked in derivation.path(str(end)) if checked.atom.match("at", 2)]
    return {place.number: str(person) for person, place in passed}


def _line_in_order(places: dict[int, str]) -> Phrase:
    """The sentence that lists the line from first to last, in the words of the clues."""
    return say(STOP, text=join([word(person) for person in places.values()], THEN))


def _line_numbered(places: dict[int, str], last: int) -> Phrase:
    """The sentence that numbers the people up to place ``last``."""
    return say(STOP, text=join([say(PLACE, n=n, p=person) for n, person in places.items() if n <= last], COMMA))
