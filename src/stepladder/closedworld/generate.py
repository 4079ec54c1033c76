"""Seed -> records: draw worlds, let clingo answer them, make options out of mistakes, prove the result.

Nothing depends on order or on a global random state: every problem draws from its own hash of who it is. The split is
decided by a hash of the world's rules, whatever the seed and the language, so a training file and a test file share no
world, whenever they were made; a draw that falls in the other split, or repeats a text, is drawn again.
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
_TEST_SHARE = 5  # one world in five is a test world
_PATIENCE = 500  # draws before we believe that a family has no new problem left
_OTHER = {"yes": "no", "no": "yes"}


class Option(NamedTuple):
    """One term of answer/1 and, for a wrong one, the mistake that leads to it."""

    term: str
    reason: str


def generate(
    seed: int, problems: int, language: str, split: str, families: Sequence[str] = tuple(FAMILIES)
) -> Iterator[dict[str, Any]]:
    """Problems in turn over families and levels; asking for more of them only adds to the end."""
    for what, given, known in (("language", [language], LANGUAGES), ("split", [split], SPLITS)):
        _check(what, given, known)
    _check("family", families, tuple(FAMILIES))
    if not families:
        raise UserError(f"Name at least one family of {', '.join(FAMILIES)}.")
    return _records(seed, problems, cast(Language, language), split, families)


def to_line(record: dict[str, Any]) -> str:
    """The record as one JSON line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def _check(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"There is no closed-world {what} {name!r}; choose from {', '.join(known)}.")


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
    """The first draw in the right split with a new text and options for every question, or None."""
    for attempt in range(_PATIENCE):
        draw = Random(_number(f"{identity}/{attempt}"))
        world = FAMILIES[family].build(draw, level)
        # English stands for all languages here, so that a seed gives the same worlds in each.
        if _split(world) != split or world.story["en"] in seen:
            continue
        questions = [_question(world, query, draw, language) for query in world.queries]
        if None in questions:
            continue
        seen.add(world.story["en"])
        problem = world.story[language]
        # The number is the text's own, so records of several seeds, splits and languages can live in one file.
        return {
            "id": f"{family}-{level}-{_number(problem) % 10**12:012d}",
            "problem": problem,
            "source": f"closedworld/{family}/{level}",
            "questions": questions,
        }
    return None


def _question(world: World, query: Query, draw: Random, language: Language) -> dict[str, Any] | None:
    """One sub-question with shuffled options, or None when the mistakes all lead to the right answer."""
    derivation = derive((*world.rules, *query.asks))
    if derivation.answers != [query.witness]:
        raise RuntimeError(f"the proof says {derivation.answers}, the witness {query.witness}: {query.question['en']}")
    options = [Option(query.witness, "the answer"), *_wrong(query)]
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


def _wrong(query: Query) -> list[Option]:
    """Different wrong answers, as many as there is room for, each with the first mistake that leads to it."""
    room = query.options - 1
    wrong: dict[str, Option] = {}
    for mistake in query.mistakes:
        if len(wrong) >= room:
            break
        for term in answers(only_model(text_of(mistake.program))):
            if term != query.witness:
                wrong.setdefault(term, Option(term, f"for a reader who {mistake.reason}"))
    if not wrong and query.witness in _OTHER:
        return [Option(_OTHER[query.witness], "the other word")]
    return list(wrong.values())[:room]


def _program(world: World, query: Query, options: list[Option]) -> str:
    """The program that travels with the question; each option's mistake stays on record in a comment."""
    choices = (
        f"{Rule(f'opt({i})', (f'answer({option.term})',))}  % {option.reason}\n" for i, option in enumerate(options)
    )
    return f"{text_of((*world.rules, *query.asks))}{''.join(choices)}#show opt/1.\n"


def _split(world: World) -> str:
    return "train" if _number("\n".join(sorted(map(str, world.rules)))) % _TEST_SHARE else "test"


def _number(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest())
