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


@dataclass
class Teacher:
    """A priced model: who it is, what it costs, and the servers it is reached at."""

    name: str
    price: Price
    servers: Callable[[], Sequence[Endpoint]]
    """Which servers there are now; asked again and again, the same address is the same endpoint."""


def teacher(
    name: str,
    model: Model,
    admission: Admission | None = None,
    note: Note = lambda line: None,
    start: int = START,
) -> Teacher:
    """A model of the configuration as the engine asks it; ``start`` is how many requests are in flight at each server
    before its first answer."""
    if model.price is None:
        raise AskError(f"model {name!r} has no price; without one no budget can be kept")
    served, key = model.served_as(name), api_key(name, model)

    @functools.cache
    def endpoint(url: str) -> Endpoint:
        gate = Gate(model.concurrency, model.requests_per_minute, model.tokens_per_minute, start)
        return Endpoint(url, lambda: Http(url, served, key, model.timeout, model.cap_name), gate, admission)

    file = None if model.base_url_file is None else Addresses(model.base_url_file, note)
    return Teacher(name, model.price, lambda: [endpoint(url) for url in (model.base_url if file is None else file())])


def api_key(name: str, model: Model) -> str:
    """The API key; a server of one's own that wants none gets a word."""
    if model.api_key_env is None:
        return "none"
    if not (key := os.environ.get(model.api_key_env, "")):
        raise AskError(f"model {name!r}: environment variable {model.api_key_env} is not set; put the key there")
    return key
