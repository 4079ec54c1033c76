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
_OPTION = re.compile(r"^[\s*]*([A-Z])[\s*]*[.、．:：)）]\s*(.+?)\s*$", re.MULTILINE)
_ASKS = re.compile(r"^(?:answer\(|opt\(|#show)")


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
    asked, reasoning = _QUESTION.search(text), _REASONING.search(text)
    if asked is None or reasoning is None or reasoning.start() < asked.end():
        raise Unfit("no question and reasoning in the form asked for")
    program = _PROGRAM.search(text, reasoning.end())
    chain = text[reasoning.end() : program.start() if program else None].strip()
    rules = text[program.end() :].strip().removesuffix("```").strip() if program else ""
    body = text[asked.end() : reasoning.start()]
    found = list(_OPTION.finditer(body))
    options = tuple(match[2].strip("* ") for match in found)
    stem = body[: found[0].start()].strip() if found else ""
    if not stem:
        raise Unfit("no question in front of the options")
    if [match[1] for match in found] != list(LETTERS[: len(found)]) or len(found) < 2:
        raise Unfit("options are not lettered A, B and so on, each on a line")
    if len({option.casefold() for option in options}) < len(options):
        raise Unfit("two options are the same")
    letter = strict(chain, options).letter
    if letter is None:
        raise Unfit("no answer line at the end")
    question = source.model_copy(
        update={"id": name, "question": stem, "options": options, "answer": letter, "worked": None, "program": None}
    )
    if fixed(question).places:
        raise Unfit("options speak of each other")
    return Draft(question, chain, rules)


def is_repeated(question: Question, others: Iterable[Question]) -> bool:
    """Whether a question about the same problem asks the same, in other words or with its options in another order."""
    mine = _asked(question)
    return any(similarity(mine, _asked(other)) >= SAME for other in others)


def _asked(question: Question) -> np.ndarray:
    return ngrams(f"{question.question}\n{' '.join(sorted(question.options))}")


def facts(program: str) -> str:
    """A question's program without what asks: the problem itself."""
    return "\n".join(line for line in program.splitlines() if line.strip() and not _ASKS.match(line.strip()))


def complete(base: str, rules: str) -> str:
    """The program that has to prove a new question: the problem's own facts and rules, which the writer may not touch,
    and his rules for it."""
    return f"{base}\n{rules}\n#show opt/1.\n"
