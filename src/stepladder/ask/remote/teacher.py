"""A model of the configuration as it is asked over HTTP: name, price, API key, servers."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stepladder.ask.remote.admission import Admission
from stepladder.ask.remote.gate import PROBES, Gate
from stepladder.ask.remote.listener import Note
from stepladder.ask.remote.openai_http import Http
from stepladder.ask.remote.servers import Addresses, Endpoint
from stepladder.config import Model, Price
from stepladder.errors import AskError
from stepladder.text import USUAL_CONTROL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RemoteModel(NamedTuple):
    """A model of the configuration, and how to ask it."""

    name: str
    """Its name in the ledger and in messages."""
    settings: Model
    batch: bool = False
    """Whether to use the provider's batch API."""
    dedicated: bool = False
    """Whether its servers were started by this process, for it alone: then ``concurrency`` requests are in flight from
    the beginning, and none of them has to show what it serves."""
    takes_token_ids: bool = False
    """Whether its servers are vLLM's: then prompts go to them as token ids, many a call."""
    key: str | None = None
    """The API key of servers that this process has started; the keys of all others are in the environment."""
    control_tokens: re.Pattern[str] = USUAL_CONTROL_TOKENS
    """What its tokenizer makes control tokens of."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer of its weights; by default that of ``path``, where they are on this machine."""

    @property
    def served(self) -> str:
        """The name that its servers know it by."""
        return self.settings.served_as(self.name)


@dataclass
class PricedModel:
    """A model as the engine asks it."""

    name: str
    price: Price
    servers: Callable[[], Sequence[Endpoint]]
    """Returns the current servers; for the same address always the same endpoint."""


def priced_model(
    model: RemoteModel,
    admission: Admission | None = None,
    note: Note = lambda line: None,
    start: int = PROBES,
) -> PricedModel:
    """Make a model of the configuration ready for the engine. ``start`` is how many requests are in flight at each
    server before its first answer.

    Raises:
        AskError: it has no price, or its API key is not set.
    """
    settings = model.settings
    if settings.price is None:
        raise AskError(f"model {model.name!r} has no price, so no budget can be kept; set one in [models.{model.name}]")
    key = api_key(model)

    @functools.cache
    def endpoint(url: str) -> Endpoint:
        gate = Gate(settings.concurrency, settings.requests_per_minute, settings.tokens_per_minute, start)
        timeout = settings.timeout
        how = (settings.cap_name, model.control_tokens, settings.extra_body)
        http = functools.partial(Http, url, model.served, key, timeout, *how)
        return Endpoint(url, http, gate, admission, timeout)

    addresses = None if settings.base_url_file is None else Addresses(settings.base_url_file, note)

    def servers() -> list[Endpoint]:
        return [endpoint(url) for url in (settings.base_url if addresses is None else addresses())]

    return PricedModel(model.name, settings.price, servers)


def api_key(model: RemoteModel) -> str:
    """The API key: the model's own, or from the environment; ``none`` for a model without ``api_key_env``.

    Raises:
        AskError: the environment variable is not set, or holds no key.
    """
    if model.key is not None:
        return model.key
    variable = model.settings.api_key_env
    if variable is None:
        return "none"
    if not (key := os.environ.get(variable, "")):
        raise AskError(f"model {model.name!r}: environment variable {variable} is not set; put the key there")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise AskError(
            f"model {model.name!r}: environment variable {variable} holds a character that no key has (a space, a line "
            "break?); put the key alone there"
        )
    return key
