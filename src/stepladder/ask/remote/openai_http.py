"""OpenAI-compatible HTTP: chat requests and model lists (the batch API is in ``batch_api``)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stepladder.ask.foreign_json import one_line, read_json
from stepladder.ask.outcome import Delivery, Unreachable
from stepladder.ask.remote.completions import Completions
from stepladder.ask.remote.wire import AsyncWire, Reply, reason
from stepladder.ask.request import Request
from stepladder.records import Message
from stepladder.text import USUAL_CONTROL_TOKENS, without_control_tokens

CapName = Literal["max_tokens", "max_completion_tokens"]
MAX_LISTING_BYTES = 8_000_000
"""Of a list of models, or of the token ids of a prompt."""


def chat_body(
    request: Request,
    model: str,
    cap_name: CapName,
    control_tokens: re.Pattern[str],
    extra_body: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON body of a POST to /chat/completions. The server renders the messages itself, so that their
    ``control_tokens`` are broken up before. ``extra_body``: keys that only this model's server knows."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": message.role, "content": without_control_tokens(control_tokens, message.content)}
            for message in request.messages
        ],
        cap_name: request.max_tokens,
        **request.sampling,
    }
    if request.messages[-1].role == "assistant":  # how vLLM is asked to continue this message
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body | dict(extra_body or {})


class Http:
    """A model behind an OpenAI-compatible base URL.

    Args:
        base_url: up to and including ``/v1``.
        model: the name that the server knows it by.
        key: the API key, only ever sent in the Authorization header.
        timeout: seconds for a whole attempt.
        cap_name: the server's name for ``max_tokens``; some providers use the longer one for reasoning models.
        control_tokens: what its tokenizer makes control tokens of.
        extra_body: further keys of every request's body.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str,
        timeout: float,
        cap_name: CapName = "max_tokens",
        control_tokens: re.Pattern[str] = USUAL_CONTROL_TOKENS,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self._wire = AsyncWire(base_url, key, timeout)
        self._key, self._model, self._timeout, self._cap_name = key, model, timeout, cap_name
        self._control_tokens, self._extra_body = control_tokens, extra_body or {}
        self._is_vllm = True
        """Whether token ids may be sent to it; until it has shown otherwise."""
        self._base = base_url.rstrip("/")
        self._root = self._base.removesuffix("/v1")
        self._completions = Completions(self._wire, f"{self._base}/completions", model, timeout, self._extra_body)

    async def send(self, request: Request, idempotency_key: str) -> Delivery:
        """Make one attempt. Never raises an error of the connection, or of what came over it: it is in the delivery. A
        request with ``prompt_token_ids`` goes to vLLM's completions, together with others, and to a server that is no
        vLLM as a chat request."""
        if request.prompt_token_ids is not None and self._is_vllm:
            return await self._completions.send(request)
        body = chat_body(request, self._model, self._cap_name, self._control_tokens, self._extra_body)
        headers = {"Idempotency-Key": idempotency_key}
        try:
            async with asyncio.timeout(self._timeout):  # the client's own timeout starts anew with every chunk
                reply = await self._wire.fetch(
                    "POST", f"{self._base}/chat/completions", request.reply_bound, body, headers
                )
            return Delivery(reply.status, reply.body, reply.headers, reply.flaw)
        except TimeoutError:
            return Delivery(error=f"no whole answer within {self._timeout:g} s")
        except Exception as error:  # noqa: BLE001 (the library raises all sorts of errors at bytes that are no HTTP)
            return self._wire.lost(error)

    async def models(self) -> list[str] | None:
        """Model names that the server lists, or None if it has no such list. Raises Unreachable."""
        listed = await self._get_json("GET", f"{self._base}/models")
        try:
            return None if listed is None else [one_line(model["id"]) for model in listed["data"]]
        except (LookupError, TypeError, AttributeError):
            return None

    async def tokens(self, messages: Sequence[Message]) -> list[int] | None:
        """Prompt token ids of a conversation from vLLM's /tokenize, or None if the server has no such path. Raises
        Unreachable."""
        body = {"model": self._model, "messages": [message.model_dump() for message in messages]}
        listed = await self._get_json("POST", f"{self._root}/tokenize", body)
        tokens = listed.get("tokens") if isinstance(listed, dict) else None
        if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
            self._is_vllm = False
            return None
        return tokens

    async def _get_json(self, method: str, url: str, body: object = None) -> Any:
        """The JSON of a reply, or None if the server has no such path or replies something else. Raises Unreachable."""
        try:
            async with asyncio.timeout(self._timeout):
                reply: Reply = await self._wire.fetch(method, url, MAX_LISTING_BYTES, body)
        except Exception as error:  # noqa: BLE001 (as above)
            raise Unreachable(reason(error, self._key)) from None
        if reply.status >= 500 or reply.status == 429:
            raise Unreachable(f"HTTP {reply.status}")
        try:
            return read_json(reply.body) if reply.status == 200 and not reply.flaw else None
        except ValueError:
            return None

    async def close(self) -> None:
        await self._completions.close()
        await self._wire.close()
