"""One HTTP request and its reply, with a stranger at the other end.

A reply is read up to a limit, also while it is unpacked; a redirect is a reply like any other and not followed; the API
key is struck out of whatever comes back; and what is meant for this machine goes to no proxy.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stepladder.ask.foreign_json import one_line
from stepladder.errors import MissingExtra

MIN_SECRET_CHARACTERS = 8
"""A shorter key is a placeholder such as ``none``; struck out, it would be missing from answers."""
STRUCK_OUT = "[api key]"
MIN_BYTES_PER_SECOND = 20_000
"""A file that comes more slowly than this is given up."""
PACKED_ENCODINGS = ("gzip", "x-gzip", "deflate")


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    """By name in lower case."""
    body: bytes
    flaw: str
    """Why the body is not what the server sent, if it is not."""


class AsyncWire:
    """Requests of many tasks to one base URL. ``timeout_seconds`` is for each wait for the server."""

    def __init__(self, base_url: str, key: str, timeout_seconds: float) -> None:
        openai = _import_sdk()
        self._key = key
        self._client = openai.DefaultAioHttpClient(**_options(base_url, key, timeout_seconds))

    async def fetch(
        self, method: str, url: str, limit_bytes: int, body: object = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        """Send a request with a JSON body, if there is one. Raises whatever the libraries raise."""
        async with self._client.stream(method, url, json=body, headers=dict(headers)) as response:
            packed = bytearray()
            parts = response.aiter_raw()
            async with contextlib.aclosing(parts):
                async for part in parts:
                    packed += part
                    if len(packed) > limit_bytes:
                        break
        return _reply(response, bytes(packed), limit_bytes, self._key)

    async def close(self) -> None:
        await self._client.aclose()


class Wire:
    """Requests to one base URL, one at a time."""

    def __init__(self, base_url: str, key: str, timeout_seconds: float) -> None:
        openai = _import_sdk()
        self._key, self._timeout_seconds = key, timeout_seconds
        self._client = openai.DefaultHttpxClient(**_options(base_url, key, timeout_seconds))

    def fetch(self, method: str, url: str, limit_bytes: int, **content: Any) -> Reply:
        """Send a request; ``content`` is the body, in the words of httpx. Raises whatever the libraries raise, and
        TimeoutError if a reply comes too slowly."""
        with self._client.stream(method, url, **content) as response:
            packed = bytearray()
            began_seconds = time.monotonic()
            for part in response.iter_raw():
                packed += part
                if len(packed) > limit_bytes:
                    break
                allowed_seconds = self._timeout_seconds + len(packed) / MIN_BYTES_PER_SECOND
                if time.monotonic() - began_seconds > allowed_seconds:
                    raise TimeoutError(f"only {len(packed):,} bytes in {allowed_seconds:g} s")
        return _reply(response, bytes(packed), limit_bytes, self._key)

    def close(self) -> None:
        self._client.close()


def redact(data: bytes, key: str) -> bytes:
    """The bytes without the key, as it is and as JSON writes it."""
    if len(key) >= MIN_SECRET_CHARACTERS:
        for secret in {key, json.dumps(key)[1:-1]}:
            data = data.replace(secret.encode(), STRUCK_OUT.encode())
    return data


def reason(error: BaseException, key: str) -> str:
    """What a failed request died of, as a message: the innermost cause, without the key."""
    root = list(causes(error))[-1]
    text = redact(f"{type(root).__name__}: {root}".encode(errors="replace"), key)
    return one_line(text.decode(errors="replace")).rstrip(": ")


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _import_sdk() -> Any:
    try:
        import aiohttp  # noqa: F401 (the SDK imports it only when it is used)
        import openai
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "openai", "'stepladder[api]'") from None
    return openai


def _options(base_url: str, key: str, timeout_seconds: float) -> dict[str, Any]:
    """Of httpx's clients."""
    return {
        "headers": {"Authorization": f"Bearer {key}", "Accept": "application/json", "Accept-Encoding": "gzip"},
        "timeout": timeout_seconds,
        "follow_redirects": False,
        "trust_env": not is_loopback(base_url),
    }


def _reply(response: Any, packed: bytes, limit_bytes: int, key: str) -> Reply:
    headers = {str(name).lower(): redact(str(value).encode(), key).decode() for name, value in response.headers.items()}
    body, flaw = _unpacked(packed, headers.get("content-encoding", "").strip().lower(), limit_bytes)
    return Reply(response.status_code, headers, redact(body, key), flaw)


def _unpacked(packed: bytes, encoding: str, limit_bytes: int) -> tuple[bytes, str]:
    """The body, and what is wrong with it."""
    too_long = f"longer than {limit_bytes:,} bytes, which no answer to this is"
    if encoding in ("", "identity"):
        return packed[:limit_bytes], too_long if len(packed) > limit_bytes else ""
    if encoding not in PACKED_ENCODINGS:
        return packed[:limit_bytes], f"packed as {one_line(encoding)[:40]!r}, which was not asked for"
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)  # by its header, gzip or zlib
    try:
        body = unpacking.decompress(packed, limit_bytes + 1)
    except zlib.error as error:
        return b"", f"not {encoding}, as its header says ({error})"
    if len(body) > limit_bytes or len(packed) > limit_bytes:
        return body[:limit_bytes], too_long
    return body, "" if unpacking.eof else f"cut off in the middle of its {encoding}"
