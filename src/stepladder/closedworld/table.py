"""Table look-up in one, two or three hops: a person has a team, a team has a city, a city has a day.

Level 1 is one table of four rows, level 2 two tables of four, level 3 three tables of three.
"""

from dataclasses import dataclass
from random import Random

from stepladder.closedworld.derive import Derivation
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.words import CITIES, COLOURS, DAYS, GOODS, NAMES, WEATHER, Phrase, say, sentences
from stepladder.closedworld.world import Mistake, Query, World

Row = tuple[str, str]
Table = tuple[Row, ...]


@dataclass(frozen=True)
class Hop:
    """One table: the ids its value column may hold, the sentence of a row, and the question that asks for a value."""

    values: tuple[str, ...]
    row: Phrase
    question: Phrase


ROOMS = tuple(str(number) for number in range(2, 10))
THEMES: tuple[tuple[Hop, Hop, Hop], ...] = (
    (
        Hop(
            tuple(COLOURS),
            {"en": "{k} is in team {v}.", "zh": "{k}在{v}队。"},
            {"en": "Which team is {k} in?", "zh": "{k}在什么颜色的队？"},
        ),
        Hop(
            tuple(CITIES),
            {"en": "Team {k} is from {v}.", "zh": "{k}队来自{v}。"},
            {"en": "Which city is {k} from?", "zh": "{k}来自哪座城市？"},
        ),
        Hop(
            tuple(DAYS),
            {"en": "{k} plays on {v}.", "zh": "{k}{v}比赛。"},
            {"en": "Which day does {k} play?", "zh": "{k}哪天比赛？"},
        ),
    ),
    (
        Hop(
            tuple(COLOURS),
            {"en": "{k} takes the {v} bus.", "zh": "{k}坐{v}车。"},
            {"en": "Which bus does {k} take?", "zh": "{k}坐什么颜色的车？"},
        ),
        Hop(
            tuple(CITIES),
            {"en": "The {k} bus goes to {v}.", "zh": "{k}车去{v}。"},
            {"en": "Which city does {k} go to?", "zh": "{k}去哪座城市？"},
        ),
        Hop(
            tuple(WEATHER),
            {"en": "{k} is {v}.", "zh": "{k}{v}。"},
            {"en": "How is the city {k} goes to?", "zh": "{k}去的城市天气如何？"},
        ),
    ),
    (
        Hop(
            tuple(COLOURS),
            {"en": "{k} has the {v} key.", "zh": "{k}有{v}钥匙。"},
            {"en": "Which key does {k} have?", "zh": "{k}有什么颜色的钥匙？"},
        ),
        Hop(
            ROOMS,
            {"en": "The {k} key opens room {v}.", "zh": "{k}钥匙能开{v}号房。"},
            {"en": "Which room can {k} open?", "zh": "{k}能开几号房？"},
        ),
        Hop(
            tuple(GOODS),
            {"en": "Room {k} has {v}.", "zh": "{k}号房里有{v}。"},
            {"en": "What is in the room {k} can open?", "zh": "{k}能开的房里有什么？"},
        ),
    ),
)


def build(draw: Random, level: int) -> World:
    hops = draw.choice(THEMES)[:level]
    rows = 3 if level == 3 else 4
    people = draw.sample(sorted(NAMES), rows)
    tables: list[Table] = []
    keys = people
    for number, hop in enumerate(hops):
        values = draw.sample(hop.values, rows)
        # Values may repeat in the first table only: two people may share a team; later tables are one to one.
        column = values if number else [values[0], values[1], *draw.choices(values, k=rows - 2)]
        tables.append(tuple(zip(keys, draw.sample(column, rows), strict=True)))
        keys = draw.sample(values, rows)
    story = sentences([say(hop.row, k=k, v=v) for hop, table in zip(hops, tables, strict=True) for k, v in table])
    queries = tuple(_query(draw, hops, tables, person) for person in draw.sample(people, 3))
    return World(_program(tables), story, queries)


def witness(person: str, tables: list[Table]) -> str:
    """The value of the last table for a person: each table's value is the key of the next."""
    key = person
    for table in tables:
        key = dict(table)[key]
    return key


def _program(tables: list[Table]) -> tuple[Rule, ...]:
    facts = [Rule(f"row({n},{k},{v})") for n, table in enumerate(tables, 1) for k, v in table]
    return (
        *facts,
        Rule("found(1,P,V)", ("row(1,P,V)",)),
        *(Rule(f"found({n},P,V)", (f"found({n - 1},P,K)", f"row({n},K,V)")) for n in range(2, len(tables) + 1)),
    )


def _query(draw: Random, hops: tuple[Hop, ...], tables: list[Table], person: str) -> Query:
    asks = (Rule("answer(X)", (f"found({len(hops)},{person},X)",)),)

    def worked(derivation: Derivation) -> Phrase:
        path = derivation.path(f"found({len(hops)},{person},{derivation.answers[0]})")
        used = [checked.atom.arguments for checked in path if checked.atom.match("row", 3)]
        return sentences([say(hops[hop.number - 1].row, k=str(key), v=str(value)) for hop, key, value in used])

    mistakes = [
        Mistake(f"slips {slip} rows down in table {n + 1}", (*_program(_slipped(tables, n, slip)), *asks))
        for n in range(len(tables))
        for slip in range(1, len(tables[n]))
    ]
    draw.shuffle(mistakes)
    question = say(hops[-1].question, k=person)
    return Query(question, asks, witness(person, tables), tuple(mistakes), draw.choice((3, 4, 4, 4)), worked)


def _slipped(tables: list[Table], number: int, slip: int) -> list[Table]:
    """The tables as read by somebody who slips some rows down in one of them; the last row is followed by the first."""
    keys, values = zip(*tables[number], strict=True)
    slipped = tuple(zip(keys, values[slip:] + values[:slip], strict=True))
    return [*tables[:number], slipped, *tables[number + 1 :]]
