"""New questions written by models: parsed, checked for form, and compared with the existing questions."""

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

REPEAT_SIMILARITY = 0.5
"""Jaccard similarity of n-grams from which two questions about one problem count as the same."""

_ID = re.compile(r".+~[^#]+-\d+")
_QUESTION = re.compile(r"^(?:[^\S\n]|[*#])*+(?:Question|问题)[*\s]*+[:：][*\s]*+", re.MULTILINE)
_REASONING = re.compile(r"^(?:[^\S\n]|[*#])*+(?:Reasoning|推理)[*\s]*+[:：][*\s]*+", re.MULTILINE)
_PROGRAM = re.compile(r"^(?:[^\S\n]|[*#])*+(?:Program|程序)[*\s]*+[:：][*\s]*+(?:```\w*+)?", re.MULTILINE)
_OPTION = re.compile(r"^(?:[^\S\n]|\*)*+([A-Z])[ *]*+[.、．:：)）][^\S\n]*+(\S.*)$", re.MULTILINE)

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_PIECE = re.compile(rf"{_STRING}|%\*.*?(?:\*%|\Z)|%[^\n]*|\.\.|[^\".%]+|.", re.DOTALL)
_ATOM = re.compile(r"([a-z]\w*)(\([^()]*\))?")


def variant_id(problem: str, writer: str, number: int) -> str:
    """The id of the question that a model wrote about a problem, as its ``number``-th."""
    return f"{problem}~{writer}-{number}"


def is_variant(question_id: str) -> bool:
    """Whether it is the id of a question that a model wrote."""
    return _ID.fullmatch(question_id) is not None


class Unfit(Exception):
    """A model's text is not a question that can be asked; the message says why."""


class Draft(NamedTuple):
    """A new question whose answer is not yet proved: ``question.answer`` and ``chain`` are the writer's."""

    question: Question
    chain: str
    rules: str
    """The writer's rules on top of the problem's program; empty where there are none."""


def read(text: str, source: Question, name: str) -> Draft:
    """Parse a new question about the problem of ``source``.

    Args:
        text: the model's answer, in the form that the template ``variant.j2`` asks for.
        name: the new question's id.

    Raises:
        Unfit: a part is missing, options repeat or refer to each other, or there is no strict answer.
    """
    opening, reasoning = _QUESTION.search(text), _REASONING.search(text)
    if opening is None or reasoning is None or reasoning.start() < opening.end():
        raise Unfit("no question and reasoning in the requested form")
    program = _PROGRAM.search(text, reasoning.end())
    chain = text[reasoning.end() : program.start() if program else None].strip()
    rules = text[program.end() :].partition("```")[0].strip() if program else ""
    body = text[opening.end() : reasoning.start()]
    matches = list(_OPTION.finditer(body))
    options = tuple(match[2].strip().strip("* ") for match in matches)
    is_lettered = [match[1] for match in matches] == list(LETTERS[: len(matches)])
    # Text between the options belongs to none of them and would be lost.
    if (
        not is_lettered
        or len(matches) < 2
        or not all(options)
        or _OPTION.sub("", body[matches[0].start() :]).strip(" *\n")
    ):
        raise Unfit("options are not lettered A, B and so on, each on a line")
    stem = body[: matches[0].start()].strip()
    if not stem:
        raise Unfit("no question in front of the options")
    if len({" ".join(option.casefold().split()).rstrip(".。") for option in options}) < len(options):
        raise Unfit("two options are the same")
    letter = strict(chain, options).letter
    if letter is None:
        raise Unfit("no answer line at the end")
    changes = {"id": name, "question": stem, "options": options, "answer": letter}
    question = source.model_copy(update=changes | {"worked": None, "program": None, "reviewed": False})
    if fixed(question).places:
        raise Unfit("options speak of each other")
    return Draft(question, chain, rules)


def is_repeated(question: Question, others: Iterable[Question]) -> bool:
    """Whether one of ``others``, questions about the same problem, asks the same in similar words or with its options
    in another order."""
    features = _features(question)
    return any(similarity(features, _features(other)) >= REPEAT_SIMILARITY for other in others)


def _features(question: Question) -> np.ndarray:
    return ngrams(f"{question.question}\n{' '.join(sorted(question.options, key=str.casefold))}")


def facts(program: str) -> str:
    """The statements of a question's program that describe the problem: without ``opt``, ``answer`` and ``#show``."""
    statements = (
        statement
        for statement in _statements(program)
        if not statement.startswith("#show") and not _predicates(statement) & {"opt", "answer"}
    )
    return "\n".join(statements)


def only_asks(base: str, rules: str, options: int) -> bool:
    """Whether a writer's rules ask about a problem without changing it.

    Every rule must define ``opt`` or a predicate that the problem does not have; an added fact of the problem, a
    choice, a constraint or a directive could make anything follow. Every option must have a rule, and every rule for an
    option must depend on the problem's predicates: ``opt(1).`` alone proves nothing.

    Args:
        base: the problem's program.
        options: number of options.
    """
    problem_predicates = {name for statement in _statements(base) for name in _predicates(statement)}
    bodies_by_option: dict[str, list[set[str]]] = {}
    bodies: dict[str, set[str]] = {}
    for statement in _statements(rules):
        head, _, body = statement.removesuffix(".").partition(":-")
        atom = _ATOM.fullmatch(head.strip())
        if atom is None or atom[1] in problem_predicates:
            return False
        bodies.setdefault(atom[1], set()).update(_predicates(body))
        if atom[1] == "opt":
            bodies_by_option.setdefault("".join(str(atom[2]).split()), []).append(_predicates(body))
    grounded = set(problem_predicates)
    while added := {name for name, used in bodies.items() if used & grounded} - grounded:
        grounded |= added
    all_grounded = all(used & grounded for uses in bodies_by_option.values() for used in uses)
    return all_grounded and bodies_by_option.keys() >= {f"({option})" for option in range(options)}


def _statements(program: str) -> list[str]:
    """The statements of a logic program, without comments."""
    statements: list[list[str]] = [[]]
    for piece in _PIECE.findall(program):
        statements[-1].append(" " if piece.startswith("%") else piece)
        if piece == ".":
            statements.append([])
    return [statement for pieces in statements if (statement := "".join(pieces).strip())]


def _predicates(statement: str) -> set[str]:
    """The names of the predicates in a statement, those of terms left out."""
    outside, depth = [], 0
    for part in re.split(r"([()])", re.sub(_STRING, "", statement)):
        if depth <= 0:
            outside.append(part)
        depth += {"(": 1, ")": -1}.get(part, 0)
    return set(re.findall(r"(?<![\w#])[a-z]\w*", " ".join(outside))) - {"not"}
