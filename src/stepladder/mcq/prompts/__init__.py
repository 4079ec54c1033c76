"""The prompts of each language, rendered from the Jinja2 templates in this folder; a user's folder may replace any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stepladder.errors import InputError
from stepladder.isolation.templates import TemplateFault, Templates
from stepladder.mcq.shuffle import Permutation, shown, to_shown
from stepladder.records import LETTERS, Language, Message, Question
from stepladder.workspace import digest, file_digest


class Solved(NamedTuple):
    """A question with a chain that solves it, and the order in which the chain's model was shown the options."""

    question: Question
    permutation: Permutation
    chain: str


def fingerprint(folder: Path) -> str:
    """Digest of all files in a folder of user's templates; hidden ones do not count."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return digest({path.relative_to(folder).as_posix(): file_digest(path) for path in files})


@cache
def _packaged(language: Language) -> Environment:
    # Prompts are plain text for a model, not HTML: escaping would change what the student reads.
    return ImmutableSandboxedEnvironment(
        loader=PackageLoader("stepladder.mcq.prompts", language),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


@cache
def _of_user(language: Language, folder: Path) -> Templates:
    return Templates.of_folder(folder, Path(__file__).parent / language)


def _render(language: Language, folder: Path | None, template: str, **values: object) -> str:
    if folder is None:
        return _packaged(language).get_template(template).render(**values).strip()
    try:
        return _of_user(language, folder).render(template, values).strip()
    except TemplateFault as fault:
        raise InputError(
            folder / fault.name, f"cannot be rendered ({fault}); fix the template", line=fault.line
        ) from None


@cache
def _system(language: Language, folder: Path | None) -> str:
    return _render(language, folder, "system.j2")


def _lettered(question: Question, permutation: Permutation) -> list[tuple[str, str]]:
    return list(zip(LETTERS, shown(question.options, permutation), strict=False))


def ask_messages(question: Question, permutation: Permutation, folder: Path | None = None) -> tuple[Message, ...]:
    """The system and user messages that ask a question.

    Args:
        permutation: the order in which the options are shown.
        folder: the user's templates, which take precedence over the packaged ones of the same name.

    Raises:
        InputError: a template of the user's cannot be rendered.
    """
    system = _system(question.language, folder)
    user = _render(
        question.language,
        folder,
        "question.j2",
        problem=question.problem,
        question=question.question,
        options=_lettered(question, permutation),
    )
    return Message(role="system", content=system), Message(role="user", content=user)


def variant_messages(
    questions: Sequence[Question], examples: Sequence[Solved], program: str | None, folder: Path | None = None
) -> tuple[Message, ...]:
    """The message that asks for one new question about a problem.

    Args:
        questions: the existing questions about the problem, at least one.
        examples: solved questions about similar problems, to show the form of the answer.
        program: the problem as a logic program, if the model is to add rules that prove the answer.
        folder: as in :func:`ask_messages`.
    """
    shown_examples = [
        {
            "question": solved.question.model_dump(),
            "options": _lettered(solved.question, solved.permutation),
            "chain": solved.chain,
        }
        for solved in examples
    ]
    user = _render(
        questions[0].language,
        folder,
        "variant.j2",
        problem=questions[0].problem,
        asked=[question.model_dump() for question in questions],
        examples=shown_examples,
        program=program,
    )
    return (Message(role="user", content=user),)


def worked_parts(question: Question) -> tuple[str, str] | None:
    """The steps of a question's worked solution and the option's text on its last line; None if there is no worked
    solution or its last line is not the text of exactly one option."""
    if question.worked is None:
        return None
    steps, _, result = question.worked.strip().rpartition("\n")
    return (steps, result) if question.options.count(result) == 1 else None


def worked_solution(question: Question, permutation: Permutation) -> str | None:
    """The question's worked solution as a chain with the letters of an order; None as in :func:`worked_parts`.

    The chain first restates the options with their letters, and copies the right pair before the letter alone: small
    students copy a letter reliably but compute one badly (docs/experiments.md).
    """
    if (parts := worked_parts(question)) is None:
        return None
    steps, result = parts
    letter = to_shown(LETTERS[question.options.index(result)], permutation)
    options = _lettered(question, permutation)
    return _render(question.language, None, "solution.j2", steps=steps, options=options, result=result, letter=letter)
