"""What the servers of a model say that they serve, asked before anything is spent (``stepladder doctor --models``)."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from typing import Literal, NamedTuple

from stepladder.ask.foreign_json import one_line, read_json
from stepladder.ask.remote.openai_http import MAX_LISTING_BYTES
from stepladder.ask.remote.servers import read_addresses
from stepladder.ask.remote.teacher import RemoteModel, api_key
from stepladder.ask.remote.wire import AsyncWire, Reply, reason
from stepladder.config.addresses import without_password
from stepladder.errors import AskError

TIMEOUT_SECONDS = 30.0
"""For a list of models."""
WITHOUT_LIST = {404, 405, 501}
"""HTTP statuses of a server that has no list of models."""
MAX_NAMES = 5
"""Names of a list that a message shows."""


class Finding(NamedTuple):
    """Whether one server lists a model."""

    state: Literal["listed", "unchecked", "wrong"]
    text: str


def check_listed(model: RemoteModel) -> list[Finding]:
    """Ask every server of a model for its list of models; nothing is billed. One finding a server."""
    try:
        key, urls = api_key(model), _addresses(model)
    except AskError as error:
        return [Finding("wrong", str(error))]
    if not urls:
        return [Finding("wrong", f"{model.settings.base_url_file} names no server yet; write one address a line")]

    async def ask_all() -> list[Finding]:
        return await asyncio.gather(*(_check(url, model, key) for url in urls))

    return asyncio.run(ask_all())


def _addresses(model: RemoteModel) -> Sequence[str]:
    file = model.settings.base_url_file
    return model.settings.base_url if file is None else read_addresses(file)


async def _check(url: str, model: RemoteModel, key: str) -> Finding:
    shown, wire = without_password(url), AsyncWire(url, key, TIMEOUT_SECONDS)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reply = await wire.fetch("GET", f"{url.rstrip('/')}/models", MAX_LISTING_BYTES)
    except TimeoutError:
        return Finding("wrong", f"{shown} did not answer within {TIMEOUT_SECONDS:g} s; see whether it runs")
    except Exception as error:  # noqa: BLE001 (the libraries raise all sorts of errors at bytes that are no HTTP)
        return Finding("wrong", f"{shown} cannot be reached ({reason(error, key)}); see whether it runs")
    finally:
        await wire.close()
    return judge_listing(shown, model, reply)


def judge_listing(url: str, model: RemoteModel, reply: Reply) -> Finding:
    """What a server's reply to the question for its models says about one of them."""
    if reply.status in (401, 403):
        variable = model.settings.api_key_env
        fix = "name its variable in api_key_env" if variable is None else f"put the right one into {variable}"
        return Finding("wrong", f"{url} refuses the API key (HTTP {reply.status}); {fix}")
    if reply.status in WITHOUT_LIST:
        return Finding(
            "unchecked", f"{url} has no list of models (HTTP {reply.status}), so {model.served} is unchecked"
        )
    if reply.status != 200 or reply.flaw:
        return Finding("wrong", f"{url} gives no list of models ({reply.flaw or f'HTTP {reply.status}'}); try again")
    try:
        rows = {one_line(row["id"]): row for row in read_json(reply.body)["data"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        return Finding("unchecked", f"{url} replies with no list of models, so {model.served} is unchecked")
    if model.served not in rows:
        near = difflib.get_close_matches(model.served, rows, MAX_NAMES, cutoff=0.3) or sorted(rows)[:MAX_NAMES]
        names = ", ".join(near) or "none"
        return Finding(
            "wrong",
            f"{url} does not list {model.served}; correct 'model' in [models.{model.name}]; of {len(rows)} models, the "
            f"nearest: {names}",
        )
    end = rows[model.served].get("shutdown_date")  # OpenAI: a date, or null
    ends = f"; it is shut down on {one_line(end)}" if isinstance(end, str) else ""
    return Finding("listed", f"{model.served} is listed by {url}{ends}")
