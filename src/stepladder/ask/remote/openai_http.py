"""OpenAI-compatible HTTP: chat requests, model lists and the batch API. The only module that imports openai."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from stepladder.ask.outcome import Delivery, Unreachable
from stepladder.ask.request import Request
from stepladder.errors import AskError, MissingExtra
from stepladder.records import Message

CapName = Literal["max_tokens", "max_completion_tokens"]


def chat_body(request: Request, model: str, cap_name: CapName) -> dict[str, Any]:
    """The JSON body of a POST to /chat/completions."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [message.model_dump() for message in request.messages],
        "temperature": request.temperature,
        cap_name: request.max_tokens,
    }
    if request.messages[-1].role == "assistant":  # how vLLM is asked to continue this message
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body


class Http:
    """A model behind an OpenAI-compatible base URL. Use as an async context manager.

    Args:
        base_url: up to and including ``/v1``.
        model: the name that the server knows it by.
        key: the API key, only ever sent in the Authorization header.
        timeout: seconds for a whole attempt.
        cap_name: the server's name for ``max_tokens``; some providers use the longer one for reasoning models.
    """

    def __init__(self, base_url: str, model: str, key: str, timeout: float, cap_name: CapName = "max_tokens") -> None:
        try:
            import aiohttp
            import httpx2
            import openai
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "openai", "'stepladder[api]'") from None
        self._openai, self._raw, self._connect_error = openai, httpx2.Response, aiohttp.ClientConnectorError
        self._model, self._timeout, self._cap_name = model, timeout, cap_name
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=0,  # the engine owns retries
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(),
        )

    async def send(self, request: Request, idempotency_key: str) -> Delivery:
        """Make one attempt. Never raises an error of the connection: it is in the delivery."""
        body = chat_body(request, self._model, self._cap_name)
        try:
            async with asyncio.timeout(self._timeout):  # the SDK's timeout starts anew with every chunk that arrives
                # The SDK's create() validates and converts the body, a third of the CPU time of a request.
                reply = await self._client.post(
                    "/chat/completions",
                    cast_to=self._raw,
                    body=body,
                    options={"headers": {"Idempotency-Key": idempotency_key}},
                )
            return Delivery(reply.status_code, reply.content, _lower_names(reply.headers))
        except TimeoutError:
            return Delivery(error=f"no whole answer within {self._timeout:g} s")
        except self._openai.APIStatusError as error:
            return Delivery(error.response.status_code, error.response.content, _lower_names(error.response.headers))
        except self._openai.APIConnectionError as error:
            # Wrapping exceptions are misleading: a server that hangs up after reading, and billing, a request comes out
            # as "ConnectTimeout". Only aiohttp's own exception shows that nothing was sent.
            causes = list(_causes(error))
            reason = f"{type(causes[-1]).__name__}: {causes[-1]}".rstrip(": ")
            return Delivery(error=reason, sent=not any(isinstance(cause, self._connect_error) for cause in causes))

    async def models(self) -> list[str] | None:
        """Model names that the server lists, or None if it has no such list. Raises Unreachable."""
        listed = await self._get_json(lambda: self._client.get("/models", cast_to=self._raw))
        try:
            return None if listed is None else [str(model["id"]) for model in listed["data"]]
        except (LookupError, TypeError):
            return None

    async def tokens(self, messages: Sequence[Message]) -> list[int] | None:
        """Prompt token ids of a conversation from vLLM's /tokenize, or None if the server has no such path. Raises
        Unreachable."""
        body = {"model": self._model, "messages": [message.model_dump() for message in messages]}
        reply = await self._get_json(lambda: self._client.post(f"{self._root}/tokenize", cast_to=self._raw, body=body))
        try:
            return None if reply is None else [int(token) for token in reply["tokens"]]
        except (LookupError, TypeError, ValueError):
            return None

    async def _get_json(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The JSON of a reply, or None if the server has no such path or replies something else. Raises Unreachable."""
        try:
            async with asyncio.timeout(self._timeout):
                return (await call()).json()
        except self._openai.APIStatusError as error:
            if error.status_code >= 500 or error.status_code == 429:
                raise Unreachable(f"HTTP {error.status_code}") from None
            return None
        except ValueError:
            return None
        except (self._openai.APIConnectionError, TimeoutError) as error:
            root = list(_causes(error))[-1]
            raise Unreachable(f"{type(root).__name__}: {root}".rstrip(": ")) from None

    async def close(self) -> None:
        await self._client.close()


class BatchApi:
    """The batch API of an OpenAI-compatible provider (platform.openai.com/docs/guides/batch).

    Every method raises :class:`Unreachable` when there was no usable reply, so that the call may be tried again,
    :class:`Gone` when the provider has no such batch or file, and :class:`Refused` when it rejects the call.
    """

    def __init__(self, base_url: str, key: str, timeout: float) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "openai", "'stepladder[api]'") from None
        self._openai, self._address = openai, base_url
        self._client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout)

    def upload(self, content: bytes) -> str:
        """Upload an input file; returns its id."""
        with self._translated_errors():
            return self._client.files.create(file=("requests.jsonl", content), purpose="batch").id

    def create(self, file: str, metadata: dict[str, str]) -> str:
        """Start a batch over an uploaded file; returns its id."""
        with self._translated_errors():
            return self._client.batches.create(
                input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
            ).id

    def retrieve(self, batch: str) -> dict[str, Any]:
        """The provider's record of a batch."""
        with self._translated_errors():
            return self._client.batches.retrieve(batch).model_dump()

    def list_batches(self) -> Iterable[dict[str, Any]]:
        """The provider's records of all batches of the account, newest first."""
        with self._translated_errors():
            for batch in self._client.batches.list(limit=100):
                yield batch.model_dump()

    def content(self, file: str) -> bytes:
        """The bytes of a file."""
        with self._translated_errors():
            return self._client.files.content(file).content

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except self._openai.APIStatusError as error:
            message = f"HTTP {error.status_code}: {' '.join(str(error.message).split())[:300]}"
            temporary = error.status_code >= 500 or error.status_code in (408, 409, 429)
            kind = Unreachable if temporary else Gone if error.status_code == 404 else Refused
            raise kind(f"{self._address}: {message}") from None
        # For a body that is not JSON the SDK raises a ValueError, or returns a str, which has none of the attributes.
        except (self._openai.APIError, ValueError, AttributeError) as error:
            root = list(_causes(error))[-1]
            raise Unreachable(f"{type(root).__name__}: {root}".rstrip(": ")) from None

    def close(self) -> None:
        self._client.close()


class Refused(AskError):
    """The provider rejects the call, and would reject it again."""


class Gone(Refused):
    """The provider has no batch or file of that id."""


def _lower_names(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
