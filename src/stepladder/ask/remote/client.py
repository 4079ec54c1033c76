"""Asking a remote model: what the ledger cannot answer goes out through a process of its own, or as a batch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stepladder import models
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import PROBE
from stepladder.ask.remote.batch import ask_in_batches, collect
from stepladder.ask.remote.gate import PROBES
from stepladder.ask.remote.listener import NO_LISTENER, Listener
from stepladder.ask.remote.sender import Sender
from stepladder.ask.remote.teacher import RemoteModel, api_key
from stepladder.ask.request import Request, Response
from stepladder.models import template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERED_AT_ONCE = 128
"""Prompts that are rendered and tokenized together."""


def ask_remote(
    requests: Sequence[Request],
    model: RemoteModel,
    ledger: Ledger,
    scope: Scope,
    listener: Listener = NO_LISTENER,
    stop: threading.Event | None = None,
    sender: Sender | None = None,
) -> dict[str, Response]:
    """Answer every request and return the responses by request key, truncated and refused ones too.

    Args:
        requests: those that the ledger can answer are not sent.
        model: the model, and how to ask it.
        ledger: stores the responses.
        scope: the account, with its caps.
        listener: receives progress, spend and messages.
        stop: once it is set, nothing more is sent.
        sender: started ahead; by default one is started where it is needed.

    Raises:
        BudgetError: a cap is reached; the answers are kept, and with a higher cap the same call asks for the rest.
        AskError: the key or the model is wrong, some requests got no answer, or ``stop`` was set.
        LedgerError: the ledger could not be written for long, or is damaged.
    """
    responses = ledger.find_all(requests)
    missing = [r for r in requests if r.key not in responses or not responses[r.key].settles(r)]
    hits = len(requests) - len(missing)
    if hits:
        with ledger.transaction():
            ledger.add_hits(scope, model.name, hits)
    listener.report(hits, 0)
    if not missing:
        return responses
    settings, key = model.settings, api_key(model)  # raises before anything starts
    tokenizer = model.tokenizer or (_tokenizer(settings.path) if settings.is_own and settings.path else None)
    if tokenizer is not None:
        model = model._replace(control_tokens=template.control_tokens(tokenizer))
    after_hits = Listener(lambda finished, spent: listener.report(hits + finished, spent), listener.note)
    if model.batch:
        ask_in_batches(missing, model, key, ledger, scope, after_hits)
        return ledger.find_all(requests)
    if len(settings.base_url) == 1:
        collect(model, key, ledger, after_hits)
    must_show = settings.is_own and not model.dedicated
    job = {
        "name": model.name,
        "model": settings.model_dump(mode="json", exclude_unset=True),
        "key": model.key,  # by a pipe: nobody else can read it
        "identity": missing[0].model,
        "must_show": must_show,
        "probe": template.prompt_tokens(tokenizer, PROBE) if must_show and tokenizer is not None else None,
        "control_tokens": model.control_tokens.pattern,
        "ledger": str(ledger.path),
        "scope": scope._asdict(),
        "start": settings.concurrency if model.dedicated else PROBES,
    }
    sent = iter(missing)
    if model.takes_token_ids and tokenizer is not None:
        sent = _with_token_ids(tokenizer, missing)
    (sender or Sender()).send(job, sent, after_hits, stop)
    return ledger.find_all(requests)


def _with_token_ids(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> Iterator[Request]:
    for start in range(0, len(requests), RENDERED_AT_ONCE):
        group = requests[start : start + RENDERED_AT_ONCE]
        prompts = template.prompts_tokens(tokenizer, [request.messages for request in group])
        for request, ids in zip(group, prompts, strict=True):
            yield request.model_copy(update={"prompt_token_ids": tuple(ids)})


@functools.cache
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(models.locate(path))
