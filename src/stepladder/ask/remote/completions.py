"""Prompts of token ids, many a call: vLLM's /v1/completions as a stream, which brings each answer when it is finished.

A chat request for each question would cost more processor time than a fast card leaves between two answers: HTTP, JSON,
the template and the tokenizer, on both sides. Each request is still answered, judged and stored by itself: what comes
back of it is written as the chat completion that vLLM would have sent.

``stream_interval`` and ``continuous_usage_stats`` are vLLM's (docs.vllm.ai, OpenAI-compatible server): with them a
stream holds the first token and the rest of each answer, and how many there were. A server that does not know the first
sends every token by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepladder.ask import loops
from stepladder.ask.foreign_json import read_json
from stepladder.ask.outcome import Delivery
from stepladder.ask.remote.wire import AsyncWire, Reply
from stepladder.ask.request import Request

MAX_PROMPTS = 64
"""Of one call."""
GATHER_SECONDS = 0.02
"""For which a prompt waits for others."""
STREAM_INTERVAL = 1_000_000
"""Tokens between two messages about an answer, but for its first and its last: longer than any answer."""
UNDIVIDED_STATUSES = (400, 413, 422)
"""Refusals of a call that may be due to one of its prompts: then each is sent by itself."""


class Settings(NamedTuple):
    """What the prompts of one call have in common."""

    max_tokens: int
    sampling: tuple[tuple[str, float | int], ...]
    """Temperature and the like, by the server's names."""
    top_logprobs: int | None


@dataclass(eq=False)
class Waiting:
    """A request, what has come of its answer, and the delivery that its task waits for."""

    request: Request
    delivery: asyncio.Future[Delivery]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def deliver(self, delivery: Delivery) -> None:
        if not self.delivery.done():
            self.delivery.set_result(delivery)

    def add(self, choice: dict[str, Any], usage: object) -> None:
        """Take in one message about the answer; the last one delivers it. Raises what parsing raises."""
        self.texts.append(choice["text"])
        if choice.get("logprobs"):
            self.logprobs += _as_chat(choice["logprobs"])
        if (reason := choice.get("finish_reason")) is not None:
            message = {"role": "assistant", "content": "".join(self.texts)}
            logprobs = {"content": self.logprobs} if self.logprobs else None
            finish = "length" if reason == loops.FINISH_REASON else reason
            answer = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
            self.deliver(Delivery(200, json.dumps({"choices": [answer], "usage": usage}).encode()))


class Completions:
    """Sends requests with ``prompt_token_ids`` to one server.

    Args:
        wire: the connection.
        url: of the completions.
        model: the name that the server knows it by.
        timeout_seconds: until a call's first answer is finished, and from each to the next.
        extra_body: further keys of every call's body.
    """

    def __init__(
        self, wire: AsyncWire, url: str, model: str, timeout_seconds: float, extra_body: Mapping[str, Any]
    ) -> None:
        self._wire, self._url, self._model, self._timeout_seconds = wire, url, model, timeout_seconds
        self._extra_body = extra_body
        self._waiting: list[Waiting] = []
        self._gathering: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def send(self, request: Request) -> Delivery:
        """Make one attempt, in a call together with others. Raises nothing but a cancellation."""
        loop = asyncio.get_running_loop()
        waiting = Waiting(request, loop.create_future())
        self._waiting.append(waiting)
        if len(self._waiting) >= MAX_PROMPTS:
            self._flush()
        elif self._gathering is None:
            self._gathering = loop.call_later(GATHER_SECONDS, self._flush)
        return await waiting.delivery

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _flush(self) -> None:
        """Start a call for each kind of what waits."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        groups: dict[Settings, list[Waiting]] = {}
        for waiting in self._waiting:
            request = waiting.request
            settings = Settings(request.max_tokens, tuple(request.sampling.items()), request.top_logprobs)
            groups.setdefault(settings, []).append(waiting)
        self._waiting = []
        for settings, group in groups.items():
            self._start(settings, group)

    def _start(self, settings: Settings, group: Sequence[Waiting]) -> None:
        call = asyncio.create_task(self._call(settings, group))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _call(self, settings: Settings, group: Sequence[Waiting]) -> None:
        """Send one call, and deliver each answer; at the end, whoever has none gets the reason."""
        failure: Delivery | None = Delivery(error="the stream ended before this answer was finished")
        try:
            async with asyncio.timeout(self._timeout_seconds) as limit:
                refused = await self._stream(settings, group, limit)
            if refused is not None and refused.status in UNDIVIDED_STATUSES and len(group) > 1:
                failure = None  # each is delivered by a call of its own
                for waiting in group:
                    self._start(settings, [waiting])
                return
            if refused is not None:
                failure = Delivery(refused.status, refused.body, refused.headers, refused.flaw)
        except TimeoutError:
            failure = Delivery(error=f"no whole answer for {self._timeout_seconds:g} s")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            failure = Delivery(error=f"a stream that cannot be read ({type(error).__name__})")
        except Exception as error:  # noqa: BLE001 (the library raises all sorts of errors at bytes that are no HTTP)
            failure = self._wire.lost(error)
        except asyncio.CancelledError:
            failure = Delivery(error="the run was stopped")
            raise
        finally:
            if failure is not None:
                for waiting in group:
                    waiting.deliver(failure)

    async def _stream(self, settings: Settings, group: Sequence[Waiting], limit: asyncio.Timeout) -> Reply | None:
        """Read the answers as they come. Returns the reply if it is no stream."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": [waiting.request.prompt_token_ids for waiting in group],
            "max_tokens": settings.max_tokens,
            **dict(settings.sampling),
            "add_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "stream_interval": STREAM_INTERVAL,
            "repetition_detection": loops.DETECTION,
            **self._extra_body,
        }
        if settings.top_logprobs is not None:
            body["logprobs"] = settings.top_logprobs
        limit_bytes = sum(waiting.request.reply_bound for waiting in group)
        async with self._wire.stream("POST", self._url, limit_bytes, body) as events:
            if isinstance(events, Reply):
                return events
            async for event in events:
                if event == b"[DONE]":
                    break
                message = read_json(event)
                if "choices" not in message:  # an error in the middle of it
                    return Reply(500, {}, event, "")
                for choice in message["choices"]:
                    waiting = group[_index(choice, len(group))]
                    waiting.add(choice, message.get("usage"))
                    if waiting.delivery.done():
                        limit.reschedule(asyncio.get_running_loop().time() + self._timeout_seconds)
        return None


def _index(choice: dict[str, Any], count: int) -> int:
    index = choice["index"]
    if type(index) is not int or not 0 <= index < count:
        raise IndexError(index)
    return index


def _as_chat(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Log-probabilities of a completion in the form of a chat completion."""
    tokens, values, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    return [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [
                {"token": other, "logprob": logprob}
                for other, logprob in sorted((top or {}).items(), key=lambda pair: -pair[1])
            ],
        }
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]
