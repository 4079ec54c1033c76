"""One HTTP request and its reply, with a stranger at the other end.

A reply is read up to a limit, also while it is unpacked; a redirect is a reply like any other and not followed; the API
key is struck out of whatever comes back; and what is meant for this machine goes to no proxy.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import json
import os
import ssl
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple

from stepladder.ask.foreign_json import one_line
from stepladder.ask.outcome import Delivery
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
        aiohttp = _import("aiohttp")
        self._key = key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=_trusted(base_url)),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds),
            headers=_headers(key),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            proxy=_proxy(base_url),  # and not trust_env, with which a line of ~/.netrc would come before the key
        )

    async def fetch(
        self, method: str, url: str, limit_bytes: int, body: object = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        """Send a request with a JSON body, if there is one. Raises whatever the libraries raise."""
        async with self._session.request(method, url, json=body, headers=headers, allow_redirects=False) as response:
            packed = bytearray()
            async for part in response.content.iter_any():
                packed += part
                if len(packed) > limit_bytes:
                    response.close()
                    break
        return _reply(response.status, response.headers, bytes(packed), limit_bytes, self._key)

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, limit_bytes: int, body: object
    ) -> AsyncIterator[Reply | AsyncIterator[bytes]]:
        """Send a request, and give the data of each event of the reply as it comes (server-sent events, WHATWG HTML
        9.2), or the reply if it is none of status 200. Raises whatever the libraries raise, and ValueError if it is
        longer than ``limit_bytes``."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        async with self._session.request(method, url, json=body, headers=headers, allow_redirects=False) as response:
            parts = _limited(response.content.iter_any(), limit_bytes)
            if response.status == 200:
                yield self._events(parts)
            else:
                content = b"".join([part async for part in parts])
                yield _reply(response.status, response.headers, content, limit_bytes, self._key)

    async def _events(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        buffer = b""
        async for part in parts:
            *events, buffer = (buffer + part).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield redact(event[len(b"data: ") :], self._key)

    async def close(self) -> None:
        await self._session.close()

    def lost(self, error: Exception) -> Delivery:
        """What came of a request that died of an error of the library."""
        # Wrapping exceptions are misleading: a server that hangs up after reading, and billing, a request may come out
        # as a timeout of the connection. Only this exception shows that nothing was sent.
        never_connected = _import("aiohttp").ClientConnectorError
        connected = not any(isinstance(cause, never_connected) for cause in causes(error))
        return Delivery(error=reason(error, self._key), sent=connected)


class Wire:
    """Requests to one base URL, one at a time."""

    def __init__(self, base_url: str, key: str, timeout_seconds: float) -> None:
        openai = _import("openai")
        self._key, self._timeout_seconds = key, timeout_seconds
        self._client = openai.DefaultHttpxClient(
            headers=_headers(key),
            timeout=timeout_seconds,
            follow_redirects=False,
            trust_env=not is_loopback(base_url),
        )

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
        return _reply(response.status_code, response.headers, bytes(packed), limit_bytes, self._key)

    def close(self) -> None:
        self._client.close()


async def _limited(parts: AsyncIterator[bytes], limit_bytes: int) -> AsyncIterator[bytes]:
    """The parts of a reply; raises ValueError once they are too many bytes."""
    size = 0
    async for part in parts:
        size += len(part)
        if size > limit_bytes:
            raise ValueError(f"longer than {limit_bytes:,} bytes")
        yield part


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


def _import(library: str) -> Any:
    """A library of the extra ``api``: both are slow to import, and most commands need neither."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or library, "'stepladder[api]'") from None


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Accept": "application/json", "Accept-Encoding": "gzip"}


def _proxy(base_url: str) -> str | None:
    """The proxy that the environment names for an address."""
    address = urllib.parse.urlsplit(base_url)
    if is_loopback(base_url) or urllib.request.proxy_bypass(address.netloc):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(address.scheme) or proxies.get("all")


def _trusted(base_url: str) -> ssl.SSLContext | bool:
    """The certificates by which a server is known: those of the environment (``SSL_CERT_FILE``), else certifi's, as in
    the SDK; True where none are needed."""
    if urllib.parse.urlsplit(base_url).scheme != "https":
        return True
    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or _import("certifi").where())


def _reply(status: int, headers: Mapping[str, str], packed: bytes, limit_bytes: int, key: str) -> Reply:
    kept = {
        str(name).lower(): redact(str(value).encode(errors="replace"), key).decode() for name, value in headers.items()
    }
    body, flaw = _unpacked(packed, kept.get("content-encoding", "").strip().lower(), limit_bytes)
    return Reply(status, kept, redact(body, key), flaw)


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
