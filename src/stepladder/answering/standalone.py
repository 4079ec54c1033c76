"""What a model folder needs to know to answer questions on its own, and answering them: ``stepladder predict``.

Every question gets a letter: where an answer cannot be read the model is asked again, and where that does not help the
likeliest option by token probability stands, which is said.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from stepladder import models
from stepladder.answering.client import FolderClient, computed_in
from stepladder.answering.voting import begun, counted, letters, vote
from stepladder.ask.ledger import Ledger
from stepladder.ask.request import Request, Response
from stepladder.config import Config, Predict, Serve
from stepladder.config import settings as as_settings
from stepladder.documents import Document
from stepladder.errors import InputError
from stepladder.records import LETTERS, Language, Prediction, Question

PROMPTS = "prompts"
RETRIES = 2
"""Further answers to a question whose answer nobody could read."""
WARM = 0.7
"""Temperature of those, at least."""


class AnswerSettings(NamedTuple):
    """How a model is asked: as it was when it was validated."""

    language: Language
    predict: Predict = Predict()
    serve: Serve = Serve()
    seed: int = 0
    prompts: Path | None = None
    validated_in: str | None = None
    """Number format that its validation was computed in; None where a server computed, or nobody knows."""


class ModelSettings(Document):
    """How a finished model is asked, as its folder keeps it."""

    FILE: ClassVar[str] = "stepladder.json"

    language: Language
    seed: int
    predict: Predict
    validated_in: str | None = None
    serve: Serve = Serve()


class Answers(NamedTuple):
    """Predictions in the order of the questions, and which of them are not what the model said."""

    predictions: list[Prediction]
    mended: list[str]
    """Ids of questions that were answered when asked again."""
    likeliest: list[str]
    """Ids of questions whose letter is the likeliest by token probability."""


def write_settings(config: Config, folder: Path) -> None:
    """Write into a model folder how it is asked, with the user's prompts, if there are any."""
    local = config.predict.engine == "local"
    ModelSettings(
        language=config.language,
        seed=config.seed,
        predict=Predict.model_validate(as_settings(config.predict)),
        **({"validated_in": models.dtype_name(config.predict.dtype)} if local else {}),
        # Where vLLM is, each machine knows for itself.
        serve=Serve.model_validate(as_settings(config.serve, without=("environment", "base_url", "model"))),
    ).write(folder)
    if config.prompts is not None:
        shutil.copytree(config.prompts, folder / PROMPTS, dirs_exist_ok=True)


def read_settings(folder: Path, language: Language | None) -> AnswerSettings:
    """How a model folder is asked. ``language`` takes precedence over the folder's own.

    Raises:
        InputError: the folder's file cannot be read, or there is none and no language is given.
    """
    path = folder / ModelSettings.FILE
    if not path.exists():
        if language is None:
            raise InputError(path, "is not there, so nothing tells the prompts' language; give --language zh or en")
        return AnswerSettings(language)
    stored = ModelSettings.read(folder, "copy it from the run's folder again")
    prompts = folder / PROMPTS
    return AnswerSettings(
        language or stored.language,
        stored.predict,
        stored.serve,
        stored.seed,
        prompts if prompts.is_dir() else None,
        stored.validated_in,
    )


def answer(
    client: FolderClient, weights: Path, questions: Sequence[Question], settings: AnswerSettings, label: str = "answers"
) -> Answers:
    """Answer every question, with a letter each; ``label`` says in the live view what is going on."""
    name, engine = _identity(weights, settings), settings.predict.engine

    def votes(group: Sequence[Question], predict: Predict, what: str) -> list[Prediction]:
        def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
            return client.ask(weights, requests, what, engine)

        return vote(group, "model", name, predict, settings.seed, ask, settings.prompts)

    found = {prediction.question_id: prediction for prediction in votes(questions, settings.predict, label)}
    unread = [question for question in questions if found[question.id].answer is None]
    if not unread:
        return Answers([found[question.id] for question in questions], [], [])
    warmer = {
        "votes": settings.predict.votes + RETRIES,
        "temperature": max(WARM, settings.predict.temperature),
        "adaptive": False,
    }
    again = votes(unread, settings.predict.model_copy(update=warmer), f"{label}, again")
    found |= {prediction.question_id: prediction for prediction in again}
    mended = [prediction.question_id for prediction in again if prediction.answer is not None]
    left = [question for question in unread if found[question.id].answer is None]
    requests = {}
    for question in left:
        order = tuple(range(len(question.options)))
        requests[question.id] = begun(question, order, found[question.id].texts[0], name, settings.prompts)
    tokens = client.ask(weights, list(requests.values()), f"{label}, likeliest", engine) if left else {}
    for question in left:
        letter = _likeliest(question, tokens[requests[question.id].key])
        found[question.id] = found[question.id].model_copy(update={"answer": letter})
    return Answers([found[question.id] for question in questions], mended, [question.id for question in left])


def so_far(ledger: Path, weights: Path, questions: Sequence[Question], settings: AnswerSettings) -> list[Prediction]:
    """What is known of the answers while they are still being given."""

    def known(requests: Sequence[Request]) -> Mapping[str, Response]:
        with Ledger(ledger) as opened:
            return opened.find_all(requests)

    return counted(
        questions, "model", _identity(weights, settings), settings.predict, settings.seed, known, settings.prompts
    )


def _identity(weights: Path, settings: AnswerSettings) -> str:
    return models.identity(weights, computed_in(settings.predict.engine, settings.predict, settings.serve))


def _likeliest(question: Question, response: Response) -> str:
    """The option whose letter is the likeliest next token; the first one where none is among the likeliest."""
    chances = letters(response, len(question.options))
    return max(chances, key=lambda letter: chances[letter], default=LETTERS[0])
