"""OpenAI-compatible HTTP: one attempt -> the raw bytes, or why there are none. The only import of openai."""

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
    """What is posted to /chat/completions."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [message.model_dump() for message in request.messages],
        "temperature": request.temperature,
        cap_name: request.max_tokens,
    }
    if request.messages[-1].role == "assistant":  # vLLM's way to let it go on with what it is said to have begun
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body


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
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=0,  # the engine owns retries
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(),
        )

    async def send(self, request: Request, idempotency_key: str) -> Delivery:
        """One attempt; whatever happens to it comes back as a delivery."""
        body = chat_body(request, self._model, self._cap_name)
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

    async def models(self) -> list[str] | None:
        """Names the server lists, or None if it has no such list. Raises Unreachable."""
        listed = await self._plain(lambda: self._client.get("/models", cast_to=self._raw))
        try:
            return None if listed is None else [str(model["id"]) for model in listed["data"]]
        except (LookupError, TypeError):
            return None

    async def tokens(self, messages: Sequence[Message]) -> list[int] | None:
        """Prompt token ids of a conversation from vLLM's /tokenize, or None if there is no such thing. Raises
        Unreachable."""
        body = {"model": self._model, "messages": [message.model_dump() for message in messages]}
        said = await self._plain(lambda: self._client.post(f"{self._root}/tokenize", cast_to=self._raw, body=body))
        try:
            return None if said is None else [int(token) for token in said["tokens"]]
        except (LookupError, TypeError, ValueError):
            return None

    async def _plain(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The JSON of a reply, or None where the server has no such place. Raises Unreachable."""
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
            reason = list(_causes(error))[-1]
            raise Unreachable(f"{type(reason).__name__}: {reason}".rstrip(": ")) from None

    async def close(self) -> None:
        await self._client.close()


class Files:
    """The batch API of an OpenAI-compatible provider (platform.openai.com/docs/guides/batch).

    Every method raises :class:`Unreachable` when no usable answer came, so that whoever asks may try again,
    :class:`Gone` when the provider knows no such thing, and :class:`Refused` when it says no.
    """

    def __init__(self, base_url: str, key: str, timeout: float) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "openai", "'stepladder[api]'") from None
        self._openai, self._address = openai, base_url
        self._client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout)

    def upload(self, content: bytes) -> str:
        """Store a file of requests; its name."""
        with self._said():
            return self._client.files.create(file=("requests.jsonl", content), purpose="batch").id

    def create(self, file: str, metadata: dict[str, str]) -> str:
        """Start a batch over an uploaded file; its name."""
        with self._said():
            return self._client.batches.create(
                input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
            ).id

    def look(self, batch: str) -> dict[str, Any]:
        """What the provider says of a batch."""
        with self._said():
            return self._client.batches.retrieve(batch).model_dump()

    def all(self) -> Iterable[dict[str, Any]]:
        """Every batch of the account, the newest first."""
        with self._said():
            for batch in self._client.batches.list(limit=100):
                yield batch.model_dump()

    def content(self, file: str) -> bytes:
        """The bytes of a file."""
        with self._said():
            return self._client.files.content(file).content

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except self._openai.APIStatusError as error:
            said = f"HTTP {error.status_code}: {' '.join(str(error.message).split())[:300]}"
            again = error.status_code >= 500 or error.status_code in (408, 409, 429)
            kind = Unreachable if again else Gone if error.status_code == 404 else Refused
            raise kind(f"{self._address}: {said}") from None
        # Of a body that is no JSON the SDK makes a ValueError, or hands it out as text that has none of the fields.
        except (self._openai.APIError, ValueError, AttributeError) as error:
            reason = list(_causes(error))[-1]
            raise Unreachable(f"{type(reason).__name__}: {reason}".rstrip(": ")) from None

    def close(self) -> None:
        self._client.close()


class Refused(AskError):
    """The provider says no, and will say so again."""


class Gone(Refused):
    """It knows nothing under that name."""


def _lower(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
