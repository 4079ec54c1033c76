"""How a finished model folder answers questions without its run (``stepladder predict``), and the settings it carries.

It answers as the run does (answering/voting.py), so every question gets a letter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from stepladder import models
from stepladder.answering.client import FolderClient, computed_in
from stepladder.answering.voting import Poll, count_stored, vote
from stepladder.ask.ledger import Ledger
from stepladder.ask.request import Request, Response
from stepladder.config import Config, Predict, Serve
from stepladder.config import settings as as_settings
from stepladder.documents import Document
from stepladder.errors import InputError
from stepladder.isolation.folders import files_inside
from stepladder.records import Language, Prediction, Question

PROMPTS = "prompts"


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
) -> list[Prediction]:
    """Answer every question; ``label`` names the work in the live view."""

    def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
        return client.ask(weights, requests, label, settings.predict.engine)

    return vote(_poll(weights, questions, settings), ask)


def so_far(ledger: Path, weights: Path, questions: Sequence[Question], settings: AnswerSettings) -> list[Prediction]:
    """Predictions from what a ledger holds while answers still come in; a question without any has no votes."""

    def stored(requests: Sequence[Request]) -> Mapping[str, Response]:
        if not ledger.exists():  # nothing was asked yet
            return {}
        with Ledger(ledger, read_only=True) as opened:
            return opened.find_all(requests)

    return count_stored(_poll(weights, questions, settings), stored)


def _poll(weights: Path, questions: Sequence[Question], settings: AnswerSettings) -> Poll:
    model = models.identity(weights, computed_in(settings.predict.engine, settings.predict, settings.serve))
    return Poll(questions, "model", model, settings.predict, settings.seed, settings.prompts)
