"""OpenAI-compatible HTTP: one attempt -> the raw bytes, or why there are none. The only import of openai."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

from stepladder.ask.outcome import Delivery
from stepladder.ask.request import Request
from stepladder.errors import MissingExtra

CapName = Literal["max_tokens", "max_completion_tokens"]


class Http:
    """A model behind an OpenAI-compatible base URL. Use as an async context manager.

    Args:
        base_url: up to and with ``/v1``.
        model: the name the server knows it by.
        key: the API key; it goes into the Authorization header and nowhere else.
        timeout: seconds for a whole attempt.
        cap_name: what the server calls the cap on the answer; reasoning models of some providers want the longer name.
    """

    def __init__(self, base_url: str, model: str, key: str, timeout: float, cap_name: CapName = "max_tokens") -> None:
        try:
            import aiohttp
            import httpx2
            import openai
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "openai", "'stepladder[api]'") from None
        self._openai, self._raw, self._never_connected = openai, httpx2.Response, aiohttp.ClientConnectorError
        self._model, self._timeout, self._cap_name = model, timeout, cap_name
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=0,  # the engine owns retries
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(),
        )

    async def send(self, request: Request, idempotency_key: str) -> Delivery:
        """One attempt; whatever happens to it comes back as a delivery."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [message.model_dump() for message in request.messages],
            "temperature": request.temperature,
            self._cap_name: request.max_tokens,
        }
        if request.top_p is not None:
            body["top_p"] = request.top_p
        try:
            async with asyncio.timeout(self._timeout):  # the SDK's own starts anew with every piece that arrives
                # The SDK's own create() checks and converts the body against its types: a third of all work here.
                http = await self._client.post(
                    "/chat/completions",
                    cast_to=self._raw,
                    body=body,
                    options={"headers": {"Idempotency-Key": idempotency_key}},
                )
            return Delivery(http.status_code, http.content, _lower(http.headers))
        except TimeoutError:
            return Delivery(error=f"no whole answer within {self._timeout:g} s")
        except self._openai.APIStatusError as error:
            return Delivery(error.response.status_code, error.response.content, _lower(error.response.headers))
        except self._openai.APIConnectionError as error:
            # The names in between cannot be trusted: a server that hangs up after reading, and billing, a request
            # comes out as "ConnectTimeout". Only what aiohttp itself raises says that nothing was sent.
            causes = list(_causes(error))
            reason = f"{type(causes[-1]).__name__}: {causes[-1]}".rstrip(": ")
            return Delivery(error=reason, sent=not any(isinstance(cause, self._never_connected) for cause in causes))

    async def close(self) -> None:
        await self._client.close()


def _lower(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
