"""Generate problems from a seed: draw worlds, let clingo answer them, make options out of mistakes, prove the result.

Every problem is drawn with a seed of its own, from its identity, so that nothing depends on order or global random
state. A hash of a world's rules decides its split, whatever the seed and the language, so that a training file and a
test file never share a world. A draw that falls into the other split, or repeats a text, is drawn again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from random import Random
from typing import Any, NamedTuple, cast

from stepladder.closedworld import arithmetic, chaining, ordering, table
from stepladder.closedworld.derive import answers, derive
from stepladder.closedworld.prove import only_model, prove
from stepladder.closedworld.rules import Rule, text_of
from stepladder.closedworld.words import LANGUAGES, Language, word
from stepladder.closedworld.world import LEVELS, Family, Query, World
from stepladder.errors import UserError

FAMILIES: Mapping[str, Family] = {
    "chaining": chaining,
    "ordering": ordering,
    "table": table,
    "arithmetic": arithmetic,
}
SPLITS = ("train", "test")
_TEST_ONE_IN = 5  # one world in five is a test world
_MAX_DRAWS = 500  # draws without a new problem, after which a family counts as exhausted
_OPPOSITE = {"yes": "no", "no": "yes"}


class Option(NamedTuple):
    """A term of answer/1 and where it comes from: the mistake that leads to it, if it is wrong."""

    term: str
    reason: str


def generate(
    seed: int, problems: int, language: str, split: str, families: Sequence[str] = tuple(FAMILIES)
) -> Iterator[dict[str, Any]]:
    """Yield problems as records of the question file, cycling through families and levels. With a larger ``problems``
    the first ones stay the same.

    Raises:
        UserError: an unknown language, split or family, or (while iterating) no new problem is left.
    """
    for kind, names, allowed in (("language", [language], LANGUAGES), ("split", [split], SPLITS)):
        _check(kind, names, allowed)
    _check("family", families, tuple(FAMILIES))
    if not families:
        raise UserError(f"Name at least one family of {', '.join(FAMILIES)}.")
    return _records(seed, problems, cast(Language, language), split, families)


def to_line(record: dict[str, Any]) -> str:
    """The record as one JSON line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def _check(kind: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise UserError(f"There is no closed-world {kind} {name!r}; choose from {', '.join(allowed)}.")


def _records(
    seed: int, problems: int, language: Language, split: str, families: Sequence[str]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for position in range(problems):
        turn, place = divmod(position, len(families))
        number, step = divmod(turn, len(LEVELS))
        family, level = families[place], LEVELS[step]
        identity = f"closedworld/{seed}/{split}/{family}/{level}/{number}"
        record = _new_record(identity, family, level, language, split, seen)
        if record is None:
            raise UserError(
                f"{family} level {level} has no new {split} problem after {len(seen)} problems in all; ask for fewer."
            )
        yield record


def _new_record(
    identity: str, family: str, level: int, language: Language, split: str, seen: set[str]
) -> dict[str, Any] | None:
    """The first draw in the right split with a new text and options for every question; None after many draws."""
    for attempt in range(_MAX_DRAWS):
        draw = Random(_hash(f"{identity}/{attempt}"))
        world = FAMILIES[family].build(draw, level)
        # English stands for all languages here, so that a seed gives the same worlds in each.
        if _split(world) != split or world.story["en"] in seen:
            continue
        questions = [_question_record(world, query, draw, language) for query in world.queries]
        if None in questions:
            continue
        seen.add(world.story["en"])
        problem = world.story[language]
        # The number is a hash of the text, so that problems of several seeds, splits and languages can share a file.
        return {
            "id": f"{family}-{level}-{_hash(problem) % 10**12:012d}",
            "problem": problem,
            "source": f"closedworld/{family}/{level}",
            "questions": questions,
        }
    return None


def _question_record(world: World, query: Query, draw: Random, language: Language) -> dict[str, Any] | None:
    """One question with shuffled options, or None if no mistake leads to a wrong answer."""
    derivation = derive((*world.rules, *query.asks))
    if derivation.answers != [query.witness]:
        raise RuntimeError(f"the proof says {derivation.answers}, the witness {query.witness}: {query.question['en']}")
    options = [Option(query.witness, "the answer"), *_wrong_options(query)]
    if len(options) < 2:
        return None
    draw.shuffle(options)
    right = next(i for i, option in enumerate(options) if option.term == query.witness)
    program = _program(world, query, options)
    if prove(program) != right:
        raise RuntimeError(f"the program proves another option than it derives:\n{program}")
    texts = [word(option.term)[language] for option in options]
    return {
        "question": query.question[language],
        "options": texts,
        "answer": "ABCD"[right],
        "worked": f"{query.worked(derivation)[language]}\n{texts[right]}",
        "program": program,
    }


def _wrong_options(query: Query) -> list[Option]:
    """Different wrong options, at most ``query.options - 1``, each with the first mistake that leads to it."""
    room = query.options - 1
    wrong: dict[str, Option] = {}
    for mistake in query.mistakes:
        if len(wrong) >= room:
            break
        for term in answers(only_model(text_of(mistake.program))):
            if term != query.witness:
                wrong.setdefault(term, Option(term, f"for a reader who {mistake.reason}"))
    if not wrong and query.witness in _OPPOSITE:
        return [Option(_OPPOSITE[query.witness], "the other word")]
    return list(wrong.values())[:room]


def _program(world: World, query: Query, options: list[Option]) -> str:
    """The program that is stored with the question; comments name each option's mistake."""
    choices = (
        f"{Rule(f'opt({i})', (f'answer({option.term})',))}  % {option.reason}\n" for i, option in enumerate(options)
    )
    return f"{text_of((*world.rules, *query.asks))}{''.join(choices)}#show opt/1.\n"


def _split(world: World) -> str:
    return "train" if _hash("\n".join(sorted(map(str, world.rules)))) % _TEST_ONE_IN else "test"


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest())
