"""A priced model of the configuration: how it is to be asked, its key, its price, its servers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepladder.ask.remote.admission import Admission
from stepladder.ask.remote.gate import START, Gate
from stepladder.ask.remote.listener import Note
from stepladder.ask.remote.openai_http import Http
from stepladder.ask.remote.servers import Addresses, Endpoint
from stepladder.config import Model, Price
from stepladder.errors import AskError


class RemoteModel(NamedTuple):
    """A model of the configuration, and how it is to be asked."""

    name: str
    """As the ledger and messages call it."""
    settings: Model
    batch: bool = False
    """Whether through the provider's batch API."""
    dedicated: bool = False
    """Whether its servers are there for this alone: from the beginning as many requests are in flight as its
    ``concurrency`` allows."""

    @property
    def served(self) -> str:
        """Its name at its servers."""
        return self.settings.served_as(self.name)


@dataclass
class PricedModel:
    """A priced model: who it is, what it costs, and the servers it is reached at."""

    name: str
    price: Price
    servers: Callable[[], Sequence[Endpoint]]
    """Which servers there are now; asked again and again, the same address is the same endpoint."""


def priced_model(
    model: RemoteModel,
    admission: Admission | None = None,
    note: Note = lambda line: None,
    start: int = START,
) -> PricedModel:
    """A model of the configuration as the engine asks it; ``start`` is how many requests are in flight at each server
    before its first answer."""
    settings = model.settings
    if settings.price is None:
        raise AskError(f"model {model.name!r} has no price; without one no budget can be kept")
    key = api_key(model)

    @functools.cache
    def endpoint(url: str) -> Endpoint:
        gate = Gate(settings.concurrency, settings.requests_per_minute, settings.tokens_per_minute, start)
        return Endpoint(url, lambda: Http(url, model.served, key, settings.timeout, settings.cap_name), gate, admission)

    addresses = None if settings.base_url_file is None else Addresses(settings.base_url_file, note)

    def servers() -> list[Endpoint]:
        return [endpoint(url) for url in (settings.base_url if addresses is None else addresses())]

    return PricedModel(model.name, settings.price, servers)


def api_key(model: RemoteModel) -> str:
    """The API key; a server of one's own that wants none gets a word."""
    variable = model.settings.api_key_env
    if variable is None:
        return "none"
    if not (key := os.environ.get(variable, "")):
        raise AskError(f"model {model.name!r}: environment variable {variable} is not set; put the key there")
    return key
