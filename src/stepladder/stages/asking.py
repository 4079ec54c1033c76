"""Asking a model of the configuration, whatever its engine: the one place where a stage meets ask/."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stepladder import models, template
from stepladder.ask.admission import FREE
from stepladder.ask.courier import ask
from stepladder.ask.embedded import ask_embedded
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Config, Model, Serve
from stepladder.errors import AskError, ServeError
from stepladder.progress import Progress
from stepladder.serving.vllm import Fleet
from stepladder.stages.flow import Context


def identity(config: Config, name: str) -> str:
    """Who answers to a name under ``[models]``: the hash of its weights where they are at hand, else its address."""
    model = config.models[name]
    if model.engine != "openai" or model.path is not None:
        return models.content_digest(_weights(model))
    served = model.served_as(name)
    # Servers that come and go are known by what they serve, and must show that they serve it (ask/admission.py).
    return f"{model.base_url[0].rstrip('/')} {served}" if model.base_url else f"own servers of {served}"


class Account(NamedTuple):
    """On whose account a model is asked, and how."""

    name: str
    """A rung's name, or the stage's."""
    dollars: float | None = None
    """Cap within the run's."""
    batch: bool = False


class Respondent:
    """A model under ``[models]``, asked on one account as often as one likes; weights are loaded once, and not at all
    where the ledger knows every answer."""

    def __init__(self, context: Context, name: str, account: Account) -> None:
        self._context, self._name = context, name
        self.identity = identity(context.config, name)
        self._model = context.config.models[name]
        self._load = functools.cache(lambda: Local.load(_weights(self._model)))
        self._batch = account.batch
        dollars = context.config.limits.dollars
        self._scope = Scope(context.workspace.name, account.name, _micro(dollars), _micro(account.dollars))

    def ask(self, requests: Sequence[Request], what: str) -> dict[str, Response]:
        """Responses by request key; ``what`` says in the live view what is going on.

        Raises:
            AskError: the model cannot be asked, or did not answer some requests.
            BudgetError: a cap is reached.
        """
        if self._model.engine == "local":
            return desk(self._context).compute(self._load, requests, what)
        if self._model.engine == "vllm":
            return desk(self._context).serve_and_ask(_weights(self._model), requests, self._scope, what)

        def report(done: int, micro_dollars: int) -> None:
            self._context.progress.update(what, done, len(requests), f"${micro_dollars / 1e6:.4f}")

        with Ledger(self._context.workspace.ledger) as ledger:
            return ask(
                requests,
                self._name,
                self._model,
                ledger,
                self._scope,
                report,
                self._context.progress.say,
                batch=self._batch,
            )


class Desk(NamedTuple):
    """Where a model folder is asked from: what keeps the answers, and who is told how it goes."""

    ledger: Path
    name: str
    """The run that answers are counted for."""
    scratch: Path
    """Folder for what servers write."""
    serve: Serve
    progress: Progress

    def ask(
        self, weights: Path, requests: Sequence[Request], what: str, engine: Literal["local", "vllm"]
    ) -> dict[str, Response]:
        """Responses of a model folder by request key, computed in this process or on servers started for it."""
        if engine == "vllm":
            return self.serve_and_ask(weights, requests, Scope(self.name, what), what)
        return self.compute(lambda: Local.load(weights), requests, what)

    def compute(self, load: Callable[[], Local], requests: Sequence[Request], what: str) -> dict[str, Response]:
        """Ask weights in this process, which are not loaded where the ledger knows every answer."""
        with Ledger(self.ledger) as ledger:
            return ask_embedded(
                requests, load, ledger, self.name, lambda done, total: self.progress.update(what, done, total)
            )

    def serve_and_ask(self, weights: Path, requests: Sequence[Request], scope: Scope, what: str) -> dict[str, Response]:
        """Ask weights through vLLM, which is not started where the ledger knows every answer.

        Raises:
            ServeError: the server does not start, or ended too often.
            TemplateError: the folder's tokenizer is not the one its weights were trained with.
        """

        def report(done: int, spent: int) -> None:
            self.progress.update(what, done, len(requests))

        with Ledger(self.ledger) as ledger:
            known = ledger.find_all(requests)
            if all(request.key in known and known[request.key].settles(request) for request in requests):
                report(len(requests), 0)
                return known
            template.check_folder(models.load_tokenizer(weights), weights)
            whose: dict[str, Any] = {"model": self.serve.model, "path": str(weights), "price": FREE}
            if self.serve.base_url:
                asked = Model(engine="openai", base_url=self.serve.base_url, **whose)
                return ask(requests, self.serve.model, asked, ledger, scope, report, self.progress.say)
            self.progress.update(f"{what}: vLLM starts", 0, 1)
            with Fleet(weights, self.serve.model, self.serve, self.scratch, self.progress.say) as fleet:
                asked = Model(engine="openai", base_url_file=fleet.addresses, **whose)
                try:
                    return ask(requests, self.serve.model, asked, ledger, scope, report, self.progress.say)
                except AskError as error:
                    if fleet.failure is None:
                        raise
                    raise ServeError(fleet.failure) from error


def desk(context: Context) -> Desk:
    """The desk of a run."""
    workspace = context.workspace
    return Desk(workspace.ledger, workspace.name, workspace.folder / ".serve", context.config.serve, context.progress)


def _weights(model: Model) -> Path:
    return models.locate(model.path or models.BUNDLED)


def _micro(dollars: float | None) -> int | None:
    return None if dollars is None else round(dollars * 1_000_000)
