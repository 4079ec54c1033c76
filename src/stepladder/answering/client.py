"""Asking a model of the configuration, whatever its engine: the only place where stages call ask/."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from stepladder import models
from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.local.embedded import ask_embedded
from stepladder.ask.local.engine import Local
from stepladder.ask.remote.admission import FREE
from stepladder.ask.remote.sender import Sender
from stepladder.ask.request import Request, Response
from stepladder.config import Cluster, Config, Dtype, Model, Predict, Serve
from stepladder.context import Context
from stepladder.errors import AskError, ServeError
from stepladder.forecast.memory import MAX_SEQUENCES
from stepladder.models import template
from stepladder.nodes.chosen import nodes_of
from stepladder.progress import Lane, Progress
from stepladder.serving.fleet import Fleet
from stepladder.serving.vllm import KEY_VARIABLE
from stepladder.workspace import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUEUED_BATCHES = 4
"""Batches of a server's that are in flight at once: so that it never waits for this process between two answers."""
ANSWER_TIMEOUT_SECONDS = 12 * 3600.0
"""For one answer of a server that was started for a run: it writes many at once, so each may take long."""


def identity(config: Config, name: str) -> str:
    """The identity of a model under ``[models]``: a digest of its weights where they are on this machine, else its
    address and name there."""
    model = config.models[name]
    if model.engine != "openai":
        return models.identity(_weights(model), computed_in(model.engine, config.predict, config.serve))
    # Other keys of the request's body, other answers.
    body = f" {canonical(model.extra_body)}" if model.extra_body else ""
    if model.path is not None:
        return models.content_digest(_weights(model)) + body
    served = model.served_as(name) + body
    # Where addresses change during a run, the identity is the model's name; each server must prove that it serves it
    # (ask/remote/admission.py).
    return f"{model.base_url[0].rstrip('/')} {served}" if model.base_url else f"own servers of {served}"


def computed_in(engine: Literal["local", "vllm"], predict: Predict, serve: Serve) -> str:
    """The setting that says which number format an engine computes in."""
    return predict.dtype if engine == "local" else serve.dtype


def check_ledger(ledger: Path, say: Callable[[str], None]) -> None:
    """Look for damage in a ledger, if it is there, and say what a user should know about its file.

    Raises:
        LedgerError: it is damaged.
    """
    if ledger.exists():
        with Ledger(ledger, read_only=True) as opened:
            for line in opened.check():
                say(line)


class Billing(NamedTuple):
    """The account that a model's requests count towards, and how they are sent."""

    name: str
    """A rung's name, or the stage's."""
    dollars: float | None = None
    """Cap of the account, within the run's."""
    batch: bool = False
    """Whether through the provider's batch API."""


class FolderClient:
    """Asks model folders, one at a time. Use as a context manager: the last folder stays loaded, or its servers
    running, until another one is asked or the block is left. Nothing is loaded or started where the ledger has every
    answer.

    Args:
        ledger: file of the ledger that keeps the answers.
        name: the run that answers are counted for.
        scratch: folder for the servers' logs and address files.
        serve: ``[serve]``.
        dtype: number format of weights in this process.
        progress: the live view.
        stop: once it is set, servers are stopped and nothing more is asked.
        cluster: ``[cluster]``, where servers are started on other machines.
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
        cluster: Cluster | None = None,
    ) -> None:
        self._ledger, self._name, self._scratch, self._cluster = ledger, name, scratch, cluster
        self._serve, self._dtype, self._progress, self._stop = serve, dtype, progress, stop
        self._weights: Path | None = None
        self._loaded: Local | None = None
        self._fleet: Fleet | None = None
        self._sender: Sender | None = None
        self._tokenizer: tuple[Path, PreTrainedTokenizerBase] | None = None
        self._servers = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def ask(
        self,
        weights: Path,
        requests: Sequence[Request],
        label: str,
        engine: Literal["local", "vllm"],
        scope: Scope | None = None,
        name: str | None = None,
    ) -> dict[str, Response]:
        """Responses of a model folder by request key, computed in this process or by vLLM. ``label`` names the work in
        the live view, and the account where there is no ``scope``; ``name`` is the model's in the ledger, by default
        that at the servers.

        Raises:
            ServeError: the server does not start, or ended too often.
            TemplateError: the folder's tokenizer is not the one its weights were trained with.
        """

        def report(done: int, total: int) -> None:
            self._progress.update(label, done, total)

        with Ledger(self._ledger) as ledger:
            if engine == "local":
                return ask_embedded(
                    requests, lambda: self._load(weights), ledger, self._name, report, self._progress.say
                )
            stored = ledger.find_all(requests)
            requests = [self._as_settled(request, stored.get(request.key)) for request in requests]
            if all(request.key in stored and stored[request.key].settles(request) for request in requests):
                report(len(requests), len(requests))
                return stored
            served, tokenizer = self._served_model(weights, label)
            remote = RemoteModel(
                name or self._serve.model,
                served,
                dedicated=self._fleet is not None,
                takes_token_ids=True,
                key=None if self._fleet is None else self._fleet.key,
                tokenizer=tokenizer,
            )
            sender, self._sender = self._sender, None
            try:
                return ask_remote(
                    requests,
                    remote,
                    ledger,
                    scope or Scope(self._name, label),
                    Listener(lambda done, _: report(done, len(requests)), self._progress.say),
                    self._stop,
                    sender,
                )
            except AskError as error:
                if self._fleet is None or self._fleet.failure is None:
                    raise
                raise ServeError(self._fleet.failure) from error

    def _as_settled(self, request: Request, stored: Response | None) -> Request:
        """The request as final where an answer that was cut off is all that the servers can give, since twice its cap
        would go beyond their length: they need not be started to say so once more."""
        if stored is None or stored.finished or self._serve.base_url:
            return request
        is_longest = stored.prompt_tokens + 2 * request.max_tokens > self._serve.max_length
        return request.model_copy(update={"final": True}) if is_longest else request

    def _load(self, weights: Path) -> Local:
        if self._loaded is None or self._weights != weights:
            self._clear()
            self._loaded, self._weights = Local.load(weights, self._dtype), weights
        return self._loaded

    def _served_model(self, weights: Path, label: str) -> tuple[Model, PreTrainedTokenizerBase]:
        """The model as its servers offer it, and its tokenizer. Servers are started if need be; meanwhile the tokenizer
        is loaded and a process that sends is started."""
        fields: dict[str, Any] = {"engine": "openai", "model": self._serve.model, "path": str(weights), "price": FREE}
        if self._serve.base_url:
            variable = KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else None
            model = Model(base_url=self._serve.base_url, api_key_env=variable, **fields)
            return model, self._checked_tokenizer(weights)
        if self._fleet is None or self._weights != weights:
            self._clear()
            models.release_cards()  # which a stage may have computed on before
            self._progress.update(f"{label}: vLLM starts", 0, 1)
            nodes = None if self._cluster is None else nodes_of(self._cluster)
            fleet = Fleet(weights, self._serve.model, self._serve, self._scratch, self._progress.say, self._stop, nodes)
            with ThreadPoolExecutor(1) as pool:
                tokenizer = pool.submit(self._checked_tokenizer, weights)
                self._sender = Sender()
                self._fleet, self._weights = self._servers.enter_context(fleet), weights
                tokenizer.result()
            self._progress.update(f"{label}: vLLM starts", 1, 1)
        # Only this client asks these servers, and the fleet notices when one dies: a long wait is no fault.
        model = Model(
            base_url_file=self._fleet.addresses,
            concurrency=QUEUED_BATCHES * MAX_SEQUENCES,
            timeout=ANSWER_TIMEOUT_SECONDS,
            **fields,
        )
        return model, self._checked_tokenizer(weights)

    def _checked_tokenizer(self, weights: Path) -> PreTrainedTokenizerBase:
        if self._tokenizer is None or self._tokenizer[0] != weights:
            tokenizer = models.load_tokenizer(weights)
            template.check_folder(tokenizer, weights)
            self._tokenizer = weights, tokenizer
        return self._tokenizer[1]

    def _clear(self) -> None:
        if self._loaded is not None:
            self._loaded = None
            models.release_cards()
        self._fleet = None
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._servers.close()


def folder_client(context: Context) -> FolderClient:
    """A client that answers for a run."""
    workspace, config = context.workspace, context.config
    scratch = workspace.folder / ".serve"
    return FolderClient(
        workspace.ledger, workspace.name, scratch, config.serve, config.predict.dtype, context.progress,
        cluster=config.cluster,
    )  # fmt: skip


class ModelClient:
    """A model under ``[models]``, asked on one account. Use as a context manager; until it is
    left, weights stay loaded and servers running (:class:`FolderClient`)."""

    def __init__(self, context: Context, name: str, billing: Billing) -> None:
        self._context, self._name, self._client = context, name, folder_client(context)
        self.identity = identity(context.config, name)
        self._model = context.config.models[name]
        self._batch = billing.batch
        dollars = context.config.limits.dollars
        self._scope = Scope(
            context.workspace.name, billing.name, _micro_dollars(dollars), _micro_dollars(billing.dollars)
        )

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.__exit__(*exception)

    def ask(self, requests: Sequence[Request], label: str) -> dict[str, Response]:
        """Responses by request key; ``label`` names the work in the live view.

        Raises:
            AskError: the model cannot be asked, or did not answer some requests.
            BudgetError: a cap is reached.
        """
        if self._model.engine != "openai":
            weights = _weights(self._model)
            return self._client.ask(weights, requests, label, self._model.engine, self._scope, self._name)

        def report(done: int, micro_dollars: int) -> None:
            self._context.progress.update(label, done, len(requests), f"${micro_dollars / 1e6:.4f}")

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


def _micro_dollars(dollars: float | None) -> int | None:
    return None if dollars is None else round(dollars * 1_000_000)
