"""Replies that no honest server sends, for the test server's fault ``hostile``; all of them are billed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any


def http(body: bytes, status: int = 200, **headers: str) -> bytes:
    """A response with this body; underscores in the names of headers are hyphens."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _with_text(reply: Mapping[str, Any], text: str) -> bytes:
    (choice,) = reply["choices"]
    return http(json.dumps({**reply, "choices": [{**choice, "message": {"content": text}}]}).encode())


def _with_usage(reply: Mapping[str, Any], prompt: object, completion: object) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return http(json.dumps({**reply, "usage": usage}).encode())


def _whole(reply: Mapping[str, Any]) -> bytes:
    return json.dumps(reply).encode()


_BOMB = zlib.compressobj(9, wbits=31)
BOMB = b"".join(_BOMB.compress(b" " * 1_000_000) for _ in range(100)) + _BOMB.flush()
"""100 MB in 97 kB."""
READABLE: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {
    "surrogate": lambda reply: _with_text(reply, "\ud800 Answer: A"),
    "escapes": lambda reply: _with_text(reply, "\x1b]52;c;aGk=\x07\u202e\x00 [/red] <script> Answer: A"),
    "huge usage": lambda reply: _with_usage(reply, 9, 10**30),
    "negative usage": lambda reply: _with_usage(reply, -(10**30), 5),
    "usage of text": lambda reply: _with_usage(reply, "9", [5]),
    "far reset": lambda reply: http(_whole(reply), x_ratelimit_reset_requests="1790000000"),
    "odd headers": lambda reply: http(_whole(reply), x_ratelimit_remaining_requests="-1e999", Retry_After="1e9"),
}
"""Odd, but with an answer in it, which is kept."""
UNREADABLE: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {
    "deep": lambda _: http(b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "bomb": lambda _: http(BOMB, Content_Encoding="gzip"),
    "half a gzip": lambda reply: http(gzip.compress(_whole(reply))[:-9], Content_Encoding="gzip"),
    "odd packing": lambda reply: http(_whole(reply), Content_Encoding="br"),
    "portal": lambda _: http(b"<html><body>Log in to the hotel's network</body></html>", Content_Type="text/html"),
    "no http": lambda _: b"SSH-2.0-OpenSSH_9.6\r\n",
    "odd status": lambda _: b"HTTP/1.1 banana\r\n\r\n",
    "odd length": lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "no content": lambda reply: http(json.dumps({**reply, "choices": {"0": None}}).encode()),
}
HOSTILE = {**READABLE, **UNREADABLE}
