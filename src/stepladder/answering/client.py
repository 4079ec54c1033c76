"""Asking a model of the configuration, whatever its engine: the one place where a stage meets ask/."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from stepladder import models
from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.local.embedded import ask_embedded
from stepladder.ask.local.engine import Local
from stepladder.ask.remote.admission import FREE
from stepladder.ask.request import Request, Response
from stepladder.config import Config, Dtype, Model, Predict, Serve
from stepladder.context import Context
from stepladder.errors import AskError, ServeError
from stepladder.forecast.memory import MAX_SEQUENCES
from stepladder.models import template
from stepladder.progress import Lane, Progress
from stepladder.serving.vllm import Fleet

PATIENCE = 12 * 3600.0
"""Seconds that a server which was started for a run may take for an answer, of which it writes many at once."""


def identity(config: Config, name: str) -> str:
    """Who answers to a name under ``[models]``: the hash of its weights where they are at hand, else its address."""
    model = config.models[name]
    if model.engine != "openai":
        return models.identity(_weights(model), computed_in(model.engine, config.predict, config.serve))
    if model.path is not None:
        return models.content_digest(_weights(model))
    served = model.served_as(name)
    # Servers that come and go are known by what they serve, and must show that they serve it (ask/remote/admission.py).
    return f"{model.base_url[0].rstrip('/')} {served}" if model.base_url else f"own servers of {served}"


def computed_in(engine: Literal["local", "vllm"], predict: Predict, serve: Serve) -> str:
    """The setting that says which number format an engine computes in."""
    return predict.dtype if engine == "local" else serve.dtype


class Billing(NamedTuple):
    """On whose account a model is asked, and how."""

    name: str
    """A rung's name, or the stage's."""
    dollars: float | None = None
    """Cap within the run's."""
    batch: bool = False


class FolderClient:
    """Asks model folders, one at a time. Use as a context manager: the last folder stays loaded, or its servers
    running, until another one is asked or the block is left. Nothing is loaded or started where the ledger knows every
    answer.

    Args:
        ledger: what keeps the answers.
        name: the run that answers are counted for.
        scratch: folder for what servers write.
        serve: ``[serve]``.
        dtype: what weights in this process are computed in.
        progress: where it is shown.
        stop: once it is set, servers end and nothing more is asked of them.
    """

    def __init__(
        self,
        ledger: Path,
        name: str,
        scratch: Path,
        serve: Serve,
        dtype: Dtype,
        progress: Progress | Lane,
        stop: threading.Event | None = None,
    ) -> None:
        self._ledger, self._name, self._scratch = ledger, name, scratch
        self._serve, self._dtype, self._progress, self._stop = serve, dtype, progress, stop
        self._weights: Path | None = None
        self._loaded: Local | None = None
        self._fleet: Fleet | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def ask(
        self,
        weights: Path,
        requests: Sequence[Request],
        what: str,
        engine: Literal["local", "vllm"],
        scope: Scope | None = None,
    ) -> dict[str, Response]:
        """Responses of a model folder by request key, computed in this process or by vLLM.

        Raises:
            ServeError: the server does not start, or ended too often.
            TemplateError: the folder's tokenizer is not the one its weights were trained with.
        """

        def report(done: int, total: int) -> None:
            self._progress.update(what, done, total)

        with Ledger(self._ledger) as ledger:
            if engine == "local":
                return ask_embedded(requests, lambda: self._load(weights), ledger, self._name, report)
            known = ledger.find_all(requests)
            if all(request.key in known and known[request.key].settles(request) for request in requests):
                report(len(requests), len(requests))
                return known
            served = self._served(weights, what)
            try:
                return ask_remote(
                    requests,
                    RemoteModel(self._serve.model, served, dedicated=not self._serve.base_url),
                    ledger,
                    scope or Scope(self._name, what),
                    Listener(lambda done, _: report(done, len(requests)), self._progress.say),
                    self._stop,
                )
            except AskError as error:
                if self._fleet is None or self._fleet.failure is None:
                    raise
                raise ServeError(self._fleet.failure) from error

    def _load(self, weights: Path) -> Local:
        if self._loaded is None or self._weights != weights:
            self._clear()
            self._loaded, self._weights = Local.load(weights, self._dtype), weights
        return self._loaded

    def _served(self, weights: Path, what: str) -> Model:
        """The model at the servers that run, or are started."""
        whose: dict[str, Any] = {"engine": "openai", "model": self._serve.model, "path": str(weights), "price": FREE}
        if self._serve.base_url:
            template.check_folder(models.load_tokenizer(weights), weights)
            return Model(base_url=self._serve.base_url, **whose)
        if self._fleet is None or self._weights != weights:
            self._clear()
            template.check_folder(models.load_tokenizer(weights), weights)
            self._progress.update(f"{what}: vLLM starts", 0, 1)
            fleet = Fleet(weights, self._serve.model, self._serve, self._scratch, self._progress.say, self._stop)
            self._fleet, self._weights = self._open.enter_context(fleet), weights
            self._progress.update(f"{what}: vLLM starts", 1, 1)
        # Nobody else asks them, and their keepers see them die: an answer may wait for as long as it takes.
        return Model(base_url_file=self._fleet.addresses, concurrency=MAX_SEQUENCES, timeout=PATIENCE, **whose)

    def _clear(self) -> None:
        self._loaded = self._fleet = None
        self._open.close()


def folder_client(context: Context) -> FolderClient:
    """The client of a run."""
    workspace, config = context.workspace, context.config
    scratch = workspace.folder / ".serve"
    return FolderClient(workspace.ledger, workspace.name, scratch, config.serve, config.predict.dtype, context.progress)


class ModelClient:
    """A model under ``[models]``, asked on one account as often as one likes. Use as a context manager; until it is
    left, weights stay loaded and servers running (:class:`FolderClient`)."""

    def __init__(self, context: Context, name: str, account: Billing) -> None:
        self._context, self._name, self._client = context, name, folder_client(context)
        self.identity = identity(context.config, name)
        self._model = context.config.models[name]
        self._batch = account.batch
        dollars = context.config.limits.dollars
        self._scope = Scope(context.workspace.name, account.name, _micro(dollars), _micro(account.dollars))

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, *given: object) -> None:
        self._client.__exit__(*given)

    def ask(self, requests: Sequence[Request], what: str) -> dict[str, Response]:
        """Responses by request key; ``what`` says in the live view what is going on.

        Raises:
            AskError: the model cannot be asked, or did not answer some requests.
            BudgetError: a cap is reached.
        """
        if self._model.engine != "openai":
            return self._client.ask(_weights(self._model), requests, what, self._model.engine, self._scope)

        def report(done: int, micro_dollars: int) -> None:
            self._context.progress.update(what, done, len(requests), f"${micro_dollars / 1e6:.4f}")

        with Ledger(self._context.workspace.ledger) as ledger:
            return ask_remote(
                requests,
                RemoteModel(self._name, self._model, self._batch),
                ledger,
                self._scope,
                Listener(report, self._context.progress.say),
            )


def _weights(model: Model) -> Path:
    return models.locate(model.path or models.BUNDLED)


def _micro(dollars: float | None) -> int | None:
    return None if dollars is None else round(dollars * 1_000_000)
