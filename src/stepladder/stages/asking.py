"""Asking a model of the configuration, whatever its engine: the one place where a stage meets ask/."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder import models
from stepladder.ask.courier import ask
from stepladder.ask.embedded import ask_embedded
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Config, Model
from stepladder.stages.flow import Context


def identity(config: Config, name: str) -> str:
    """Who answers to a name under ``[models]``: the hash of its weights where they are at hand, else its address."""
    model = config.models[name]
    if model.engine == "local" or model.path is not None:
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
            return _ask_embedded(self._context, self._load, requests, what)

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


def ask_weights(context: Context, weights: Path, requests: Sequence[Request], what: str) -> dict[str, Response]:
    """Ask a model folder in this process."""
    return _ask_embedded(context, lambda: Local.load(weights), requests, what)


def _ask_embedded(
    context: Context, load: Callable[[], Local], requests: Sequence[Request], what: str
) -> dict[str, Response]:
    with Ledger(context.workspace.ledger) as ledger:
        return ask_embedded(
            requests,
            load,
            ledger,
            context.workspace.name,
            lambda done, total: context.progress.update(what, done, total),
        )


def _weights(model: Model) -> Path:
    return models.locate(model.path or models.BUNDLED)


def _micro(dollars: float | None) -> int | None:
    return None if dollars is None else round(dollars * 1_000_000)
