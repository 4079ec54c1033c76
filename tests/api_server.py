"""An OpenAI-compatible HTTP server for tests, in a process of its own: the oracle of what was billed and delivered.

    python tests/api_server.py --port 0 --log LOG.jsonl --script SCRIPT.json [--seed N]

It prints ``{"port": N}`` when it is ready. Tests use ``ApiServer``. Whoever asks it may be killed at any moment: the
log goes on. A request is billed as soon as it has been read, so the books never wait for a client; ``delivered`` means
that the reply, whole and correct, was taken by the kernel while the client's end was open. (A client that half-closes
its connection counts as gone.) What can be scripted is in api_script.py, what is billed in api_provider.py.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from api_batches import CHAT, Batches, from_json
from api_hostile import HOSTILE
from api_provider import Provider, Reply, to_json
from api_script import Refusal, Script, ScriptError

KEY = "Bearer test-key"
SILENT = {"batch_lost", "disconnect_after", "disconnect_before"}
ESTABLISHED, CLOSED = 1, 7
"""TCP states of Linux."""
GARBAGE = b"<html><body>upstream connect error</body></html>"
PIECES = 8
"""How many a slow drip comes in."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def last(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


async def read_call(reader: asyncio.StreamReader) -> Call | None:
    """The next request on a connection, or None if this is not HTTP/1.1 with a Content-Length. Raises
    IncompleteReadError where the connection ends."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = headers.get("content-length", "0")
    if first.count(" ") != 2 or not length.isdecimal() or "transfer-encoding" in headers:
        return None
    method, target, _ = first.split(" ")
    body = await reader.readexactly(int(length)) if length != "0" else b""
    path, _, query = target.partition("?")
    return Call(method, path, query, headers, body)


async def hangs_up(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Wait; whether the client has had enough meanwhile. (It also has if it sends something: nobody pipelines.)"""
    try:
        await asyncio.wait_for(reader.read(1), seconds)
    except TimeoutError:
        return False
    return True


def tcp_state(writer: asyncio.StreamWriter) -> int:
    """What the kernel knows by now, which may be more than the event loop has heard of: a client that was killed has
    sent its farewell, and the answer to what is sent to it nevertheless is immediate on one machine."""
    if sys.platform != "linux":
        return ESTABLISHED
    state: bytes = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state[0]


class Server:
    """Connections on one side, the provider on the other."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.batches = Batches(provider)
        self.in_flight = self.max_in_flight = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)  # so that drained means that the kernel has all of it
        try:
            while (call := await read_call(reader)) and await self.answer(call, reader, writer):
                pass
            if call is None:
                writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone, which is its right
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def answer(self, call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Reply to one request; whether the connection can carry another."""
        chat = call.path == CHAT and call.method == "POST"
        n = self.provider.number() if chat else 0
        self.in_flight += chat
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            try:
                reply = await self.chat(n, call) if chat else self.route(call)
            except Refusal as refusal:
                n = n or self.provider.number()
                self.provider.refuse(n, refusal.status, refusal.fault)
                reply = Reply(to_json(refusal.body), refusal.status, refusal.headers)
            return await self.send(call, reply, reader, writer)
        finally:
            self.in_flight -= chat

    def authorise(self, call: Call) -> None:
        if call.headers.get("authorization") != KEY:
            raise Refusal(401, "Incorrect API key provided.")

    async def chat(self, n: int, call: Call) -> Reply:
        self.authorise(call)
        body = self.provider.check(from_json(call.body))
        headers = self.provider.limit(body)
        key = call.headers.get("idempotency-key")
        try:
            order = self.provider.serve(n, body, sha256(call.body).hexdigest(), key=key)
        except Refusal as refusal:
            refusal.headers |= headers
            raise
        if order.latency_s:
            await asyncio.sleep(order.latency_s)
        return Reply(to_json(order.reply), headers=headers, fault=order.fault, orders=[order])

    def route(self, call: Call) -> Reply:  # noqa: PLR0911
        match call.method, call.path:
            case "GET", "/health":
                return Reply(b"{}")
            case "GET", "/billing":
                flight = {"in_flight": self.in_flight, "max_in_flight": self.max_in_flight}
                return Reply(to_json(self.provider.billing() | flight))
            case "POST", "/script":
                try:
                    self.provider.use(Script.read(from_json(call.body)))
                except ScriptError as error:
                    return Reply(to_json({"error": {"message": str(error)}}), 400)
                return Reply(b"{}")
        self.authorise(call)
        if (call.method, call.path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "owned_by": "test"} for name in self.provider.script.models]
            return Reply(to_json({"object": "list", "data": models}))
        if (call.method, call.path) == ("POST", "/tokenize") and (tokens := self.provider.script.tokens) is not None:
            return Reply(to_json({"count": len(tokens), "tokens": list(tokens)}))
        kind = call.headers.get("content-type", "")
        reply = self.batches.route(call.method, call.path, call.query, kind, call.body)
        if reply is None:
            raise Refusal(404, f"Invalid URL ({call.method} {call.path})")
        return reply

    async def send(self, call: Call, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Put a reply on the wire with whatever is to go wrong there, and book it if it got through."""
        fault, kind = reply.fault, reply.fault.kind if reply.fault else ""
        if kind in SILENT or tcp_state(writer) != ESTABLISHED:
            return False
        if fault and kind == "hang":
            await hangs_up(reader, fault.seconds)
            return False
        body = GARBAGE if kind == "malformed" else reply.body
        headers = {**self.provider.script.headers, **reply.headers}
        if call.last:
            headers["connection"] = "close"
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        ).encode("latin-1")
        if kind == "hostile":
            (order,) = reply.orders
            writer.write(HOSTILE[order.hostile](order.reply))
        elif fault and kind == "slow_drip":
            step = len(body) // PIECES + 1
            writer.write(head)
            for start in range(0, len(body), step):
                if await hangs_up(reader, fault.seconds / PIECES):
                    return False
                writer.write(body[start : start + step])
        else:
            writer.write(head + (body[: len(body) // 2] if kind == "truncated_body" else body))
        await writer.drain()
        if kind == "truncated_body" or tcp_state(writer) == CLOSED:
            return False
        for order in reply.orders:
            self.provider.deliver(order)
        reply.orders.clear()  # a file that is fetched again delivers nothing new
        if kind == "duplicate":
            writer.write(head + body)
        if kind in {"duplicate", "hostile"}:
            return False
        return not call.last


async def serve(port: int, provider: Provider, *, while_stdin: bool) -> None:
    server = await asyncio.start_server(
        Server(provider).connection, "127.0.0.1", port, limit=1 << 20, backlog=4096, reuse_address=True
    )
    sys.stdout.write(json.dumps({"port": server.sockets[0].getsockname()[1]}) + "\n")
    sys.stdout.flush()
    if while_stdin:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, ended.set)
        await ended.wait()
    else:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--while-stdin", action="store_true", help="end when stdin does, so as not to outlive a test")
    options = parser.parse_args()
    try:
        script = Script.read(json.loads(options.script.read_bytes()) if options.script else {})
    except ScriptError as error:
        sys.exit(f"api_server: {error}")
    asyncio.run(serve(options.port, Provider(options.log, script, options.seed), while_stdin=options.while_stdin))


class Answer(NamedTuple):
    """What came back; header names are lower case."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class ApiServer:
    """The server for the length of a ``with``. It dies with the test, its log stays in ``tmp_path``."""

    def __init__(self, tmp_path: Path, script: dict[str, Any] | None = None, seed: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="api-", dir=tmp_path))
        self.log_path = self.folder / "log.jsonl"
        self.script = script or {}
        self.seed = seed
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        script = self.folder / "script.json"
        script.write_text(json.dumps(self.script), encoding="utf-8")
        command = [sys.executable, __file__, "--while-stdin", "--log", str(self.log_path), "--script", str(script)]
        command += ["--seed", str(self.seed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout
        ready = self.process.stdout.readline()
        if not ready:
            self.stop()
            raise RuntimeError("the test server did not start; its stderr says why")
        self.port = json.loads(ready)["port"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate()  # waits, and closes both pipes

    def billing(self) -> dict[str, int]:
        billing: dict[str, int] = self.call("GET", "/billing").json
        return billing

    def settled(self, timeout_s: float = 10) -> dict[str, int]:
        """The bill once no request is under way any more: what to look at after killing a client."""
        for _ in range(int(timeout_s / 0.02)):
            if not (billing := self.billing())["in_flight"]:
                return billing
            time.sleep(0.02)
        raise TimeoutError("requests are still in flight")

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """The books so far: all events, or those of one kind. A client can have its reply before the delivery is
        booked; a server that is running is therefore asked something first, which it does afterwards."""
        if self.process.poll() is None:
            self.billing()
        lines = self.log_path.read_bytes().splitlines() if self.log_path.exists() else []
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [entry for entry in events if event in (None, entry["event"])]

    def set_script(self, script: dict[str, Any]) -> None:
        answer = self.call("POST", "/script", json.dumps(script))
        if answer.status != 200:
            raise ValueError(answer.json["error"]["message"])

    def call(
        self, method: str, path: str, body: bytes | str | None = None, timeout: float = 10, **headers: str
    ) -> Answer:
        """One request on a connection of its own, with the right key unless another is given; never by a proxy."""
        sent = {"Authorization": KEY, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        finally:
            connection.close()


if __name__ == "__main__":
    main()
