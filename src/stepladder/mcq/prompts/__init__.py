"""The prompts of each language, as Jinja2 templates beside this file."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from stepladder.mcq.shuffle import Permutation, shown, to_shown
from stepladder.records import LETTERS, Language, Message, Question


@cache
def _environment(language: Language) -> Environment:
    # Prompts are plain text for a model, not HTML: escaping would change what the student reads.
    return Environment(
        loader=PackageLoader("stepladder.mcq.prompts", language),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701
    )


def _render(language: Language, template: str, **values: object) -> str:
    return _environment(language).get_template(template).render(**values).strip()


def _lettered(question: Question, permutation: Permutation) -> list[tuple[str, str]]:
    return list(zip(LETTERS, shown(question.options, permutation), strict=False))


def ask_messages(question: Question, permutation: Permutation) -> tuple[Message, ...]:
    """System and user message of a question with its options in the given order."""
    system = _render(question.language, "system.j2")
    user = _render(
        question.language,
        "question.j2",
        problem=question.problem,
        question=question.question,
        options=_lettered(question, permutation),
    )
    return Message(role="system", content=system), Message(role="user", content=user)


def worked_solution(question: Question, permutation: Permutation) -> str | None:
    """The question's worked solution as an answer with letters for the given order, or None where there is none or
    its last line is not one of the options.

    The choices are restated content first and the pair is copied before the letter stands alone: small students
    copy a letter reliably but compute one badly (EXPERIMENTS.md).
    """
    if question.worked is None:
        return None
    steps, _, result = question.worked.strip().rpartition("\n")
    if question.options.count(result) != 1:
        return None
    letter = to_shown(LETTERS[question.options.index(result)], permutation)
    options = _lettered(question, permutation)
    return _render(question.language, "solution.j2", steps=steps, options=options, result=result, letter=letter)
