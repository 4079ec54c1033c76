"""How a finished model folder answers questions without its run (``stepladder predict``), and the settings it carries.

Every question gets a letter: where an answer cannot be read the model is asked again, and where that does not help
either, the likeliest option by token probability is taken; :class:`Answers` lists both.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from stepladder import models
from stepladder.answering.client import FolderClient, computed_in
from stepladder.answering.voting import Poll, count_stored, letter_logprobs, letter_request, vote
from stepladder.ask.ledger import Ledger
from stepladder.ask.request import Request, Response
from stepladder.config import Config, Predict, Serve
from stepladder.config import settings as as_settings
from stepladder.documents import Document
from stepladder.errors import InputError
from stepladder.isolation.folders import files_inside
from stepladder.records import LETTERS, Language, Prediction, Question

PROMPTS = "prompts"
RETRIES = 2
"""Further answers to a question for which none could be read."""
MIN_RETRY_TEMPERATURE = 0.7


class AnswerSettings(NamedTuple):
    """How a model is asked: by default as it was validated."""

    language: Language
    predict: Predict = Predict()
    serve: Serve = Serve()
    seed: int = 0
    prompts: Path | None = None
    validated_in: str | None = None
    """Number format that its validation was computed in; None where a server computed, or it is not recorded."""


class ModelSettings(Document):
    """How a finished model is asked, as its folder keeps it."""

    FILE: ClassVar[str] = "stepladder.json"

    language: Language
    seed: int
    predict: Predict
    validated_in: str | None = None
    serve: Serve = Serve()


class Answers(NamedTuple):
    """Predictions in the order of the questions, and which of them are not from the model's first answers."""

    predictions: list[Prediction]
    read_on_retry: list[str]
    """Ids of questions whose answer could be read only when they were asked again."""
    likeliest: list[str]
    """Ids of questions whose letter is the likeliest by token probability."""


def write_settings(config: Config, folder: Path) -> None:
    """Write a run's settings, and the user's prompts if there are any, into a model folder."""
    local = config.predict.engine == "local"
    ModelSettings(
        language=config.language,
        seed=config.seed,
        predict=Predict.model_validate(as_settings(config.predict) | {"engine": config.predict.engine}),
        **({"validated_in": models.dtype_name(config.predict.dtype)} if local else {}),
        # Where vLLM is installed or served differs between machines.
        serve=Serve.model_validate(as_settings(config.serve, without=("environment", "base_url", "model"))),
    ).write(folder)
    if config.student_prompts is not None:
        files_inside(config.student_prompts)
        shutil.copytree(config.student_prompts, folder / PROMPTS, dirs_exist_ok=True)


def read_settings(folder: Path, language: Language | None) -> AnswerSettings:
    """How a model folder is asked. ``language`` takes precedence over the folder's own.

    Raises:
        InputError: the folder's file cannot be read, or there is none and no language is given.
    """
    path = folder / ModelSettings.FILE
    if not path.exists():
        if language is None:
            raise InputError(
                path, "no such file, so the language of the prompts is not known; give --language zh or en"
            )
        return AnswerSettings(language)
    stored = ModelSettings.read(folder, "copy it from the run's folder again")
    # A folder says how its model is asked, never what is started or where questions are sent.
    if named := sorted({"environment", "base_url", "model"} & stored.serve.model_fields_set):
        problem = "names a program or a server; remove it, and give it to the command instead"
        raise InputError(path, problem, field=f"serve.{named[0]}")
    if stored.predict.prompts is not None:
        raise InputError(path, f"remove it, and put the templates into {PROMPTS}/", field="predict.prompts")
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
    """Answer every question, with a letter each; ``label`` names the work in the live view."""
    model, engine = _identity(weights, settings), settings.predict.engine

    def votes(group: Sequence[Question], predict: Predict, round_label: str) -> list[Prediction]:
        def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
            return client.ask(weights, requests, round_label, engine)

        return vote(Poll(group, "model", model, predict, settings.seed, settings.prompts), ask)

    by_id = {prediction.question_id: prediction for prediction in votes(questions, settings.predict, label)}
    unread = [question for question in questions if by_id[question.id].answer is None]
    if not unread:
        return Answers([by_id[question.id] for question in questions], [], [])
    retry = settings.predict.model_copy(
        update={
            "votes": settings.predict.votes + RETRIES,
            "temperature": max(MIN_RETRY_TEMPERATURE, settings.predict.temperature),
            "adaptive": False,
        }
    )
    retried = votes(unread, retry, f"{label}, again")
    by_id |= {prediction.question_id: prediction for prediction in retried}
    read_on_retry = [prediction.question_id for prediction in retried if prediction.answer is not None]
    still_unread = [question for question in unread if by_id[question.id].answer is None]
    requests = {}
    for question in still_unread:
        order = tuple(range(len(question.options)))
        requests[question.id] = letter_request(question, order, by_id[question.id].texts[0], model, settings.prompts)
    responses = client.ask(weights, list(requests.values()), f"{label}, likeliest", engine) if requests else {}
    for question in still_unread:
        letter = _likeliest(question, responses[requests[question.id].key])
        by_id[question.id] = by_id[question.id].model_copy(update={"answer": letter})
    predictions = [by_id[question.id] for question in questions]
    return Answers(predictions, read_on_retry, [question.id for question in still_unread])


def so_far(ledger: Path, weights: Path, questions: Sequence[Question], settings: AnswerSettings) -> list[Prediction]:
    """Predictions from what a ledger holds while answers still come in; a question without any has no votes."""

    def stored(requests: Sequence[Request]) -> Mapping[str, Response]:
        with Ledger(ledger, read_only=True) as opened:
            return opened.find_all(requests)

    model = _identity(weights, settings)
    return count_stored(Poll(questions, "model", model, settings.predict, settings.seed, settings.prompts), stored)


def _identity(weights: Path, settings: AnswerSettings) -> str:
    return models.identity(weights, computed_in(settings.predict.engine, settings.predict, settings.serve))


def _likeliest(question: Question, response: Response) -> str:
    """The option whose letter is the likeliest next token; the first one where none is among the likeliest."""
    logprobs = letter_logprobs(response, len(question.options))
    return max(logprobs, key=lambda letter: logprobs[letter], default=LETTERS[0])
