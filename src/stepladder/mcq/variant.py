"""A new question as a model wrote it: read, checked for form, and compared with the questions there are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from stepladder.mcq.answer import strict
from stepladder.mcq.chains import similarity
from stepladder.mcq.overlap import ngrams
from stepladder.mcq.shuffle import fixed
from stepladder.records import LETTERS, Question

SAME = 0.5
"""Jaccard similarity of n-grams from which two questions about one problem ask the same."""

_QUESTION = re.compile(r"^[\s*#]*(?:Question|问题)[*\s]*[:：][*\s]*", re.MULTILINE)
_REASONING = re.compile(r"^[\s*#]*(?:Reasoning|推理)[*\s]*[:：][*\s]*", re.MULTILINE)
_PROGRAM = re.compile(r"^[\s*#]*(?:Program|程序)[*\s]*[:：][*\s]*(?:```\w*)?", re.MULTILINE)
_OPTION = re.compile(r"^[\s*]*([A-Z])[ *]*[.、．:：)）][^\S\n]*(\S.*?)\s*$", re.MULTILINE)

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_PIECE = re.compile(rf"{_STRING}|%\*.*?\*%|%[^\n]*|\.\.|[^\".%]+|.", re.DOTALL)
_ATOM = re.compile(r"([a-z]\w*)(\([^()]*\))?")


class Unfit(Exception):
    """What a model wrote is no question that could be asked; the message says why."""


class Draft(NamedTuple):
    """A question as written, not yet proved: ``question.answer`` is the writer's, ``chain`` how he got there."""

    question: Question
    chain: str
    rules: str
    """The writer's rules on top of the problem's program; empty where there are none."""


def read(text: str, source: Question, name: str) -> Draft:
    """A new question about the problem of ``source``.

    Args:
        text: in the form that the template ``variant.j2`` asks for.
        name: the new question's id.

    Raises:
        Unfit: a part is missing, options repeat or speak of each other, or the answer cannot be read strictly.
    """
    opening, reasoning = _QUESTION.search(text), _REASONING.search(text)
    if opening is None or reasoning is None or reasoning.start() < opening.end():
        raise Unfit("no question and reasoning in the form wanted")
    program = _PROGRAM.search(text, reasoning.end())
    chain = text[reasoning.end() : program.start() if program else None].strip()
    rules = text[program.end() :].partition("```")[0].strip() if program else ""
    body = text[opening.end() : reasoning.start()]
    found = list(_OPTION.finditer(body))
    options = tuple(match[2].strip("* ") for match in found)
    lettered = [match[1] for match in found] == list(LETTERS[: len(found)])
    # What stands between the options is none of theirs: they would be asked without it.
    if not lettered or len(found) < 2 or not all(options) or _OPTION.sub("", body[found[0].start() :]).strip(" *\n"):
        raise Unfit("options are not lettered A, B and so on, each on a line")
    stem = body[: found[0].start()].strip()
    if not stem:
        raise Unfit("no question in front of the options")
    if len({" ".join(option.casefold().split()).rstrip(".。") for option in options}) < len(options):
        raise Unfit("two options are the same")
    letter = strict(chain, options).letter
    if letter is None:
        raise Unfit("no answer line at the end")
    own = {"id": name, "question": stem, "options": options, "answer": letter}
    question = source.model_copy(update=own | {"worked": None, "program": None, "reviewed": False})
    if fixed(question).places:
        raise Unfit("options speak of each other")
    return Draft(question, chain, rules)


def is_repeated(question: Question, others: Iterable[Question]) -> bool:
    """Whether a question about the same problem asks the same, in other words or with its options in another order."""
    mine = _features(question)
    return any(similarity(mine, _features(other)) >= SAME for other in others)


def _features(question: Question) -> np.ndarray:
    return ngrams(f"{question.question}\n{' '.join(sorted(question.options, key=str.casefold))}")


def facts(program: str) -> str:
    """A question's program without what asks: the problem itself."""
    kept = (
        statement
        for statement in _statements(program)
        if not statement.startswith("#show") and not _names(statement) & {"opt", "answer"}
    )
    return "\n".join(kept)


def only_asks(base: str, rules: str, options: int) -> bool:
    """Whether a writer's rules ask about a problem without changing it.

    Each must define ``opt`` or a predicate that the problem does not have: another fact of the problem's, a choice, a
    constraint or a directive could make anything follow. And each option must have a rule that goes back to the
    problem: a bare ``opt(1).`` proves nothing, and an option without a rule is not refuted.
    """
    given = {name for statement in _statements(base) for name in _names(statement)}
    bodies_by_option: dict[str, list[set[str]]] = {}
    own: dict[str, set[str]] = {}
    for statement in _statements(rules):
        head, _, body = statement.removesuffix(".").partition(":-")
        atom = _ATOM.fullmatch(head.strip())
        if atom is None or atom[1] in given:
            return False
        own.setdefault(atom[1], set()).update(_names(body))
        if atom[1] == "opt":
            bodies_by_option.setdefault("".join(str(atom[2]).split()), []).append(_names(body))
    grounded = set(given)
    while more := {name for name, used in own.items() if used & grounded} - grounded:
        grounded |= more
    held = all(used & grounded for bodies in bodies_by_option.values() for used in bodies)
    return held and bodies_by_option.keys() >= {f"({option})" for option in range(options)}


def complete(base: str, rules: str) -> str:
    """The program that has to prove a new question: the problem's own facts and rules, which the writer may not touch,
    and his rules for it."""
    return f"{base}\n{rules}\n#show opt/1.\n"


def _statements(program: str) -> list[str]:
    """The statements of a logic program, without comments."""
    found = [""]
    for piece in _PIECE.findall(program):
        found[-1] += " " if piece.startswith("%") else piece
        if piece == ".":
            found.append("")
    return [statement.strip() for statement in found if statement.strip()]


def _names(statement: str) -> set[str]:
    """The names outside of parentheses: all predicates are among them."""
    bare, before = re.sub(_STRING, "", statement), ""
    while bare != before:
        bare, before = re.sub(r"\([^()]*\)", "", bare), bare
    return set(re.findall(r"(?<![\w#])[a-z]\w*", bare)) - {"not"}
