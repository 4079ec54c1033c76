"""A server that answers with any bytes whatsoever: what no HTTP library would send."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Callable
from typing import Any, Self


class Raw:
    """Listens for the length of a ``with``. ``answer`` gets the head and the body of each request and returns the bytes
    to be sent, head and all; then the connection is closed."""

    def __init__(self, answer: Callable[[str, bytes], bytes]) -> None:
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        seen = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                lines = []
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    lines.append(line)
                head = b"".join(lines).decode("latin-1")
                sizes = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
                body = self.rfile.read(sizes[0]) if sizes else b""
                seen.heads.append(head)
                seen.bodies.append(body)
                with contextlib.suppress(OSError):  # the client has had enough
                    self.wfile.write(answer(head, body))

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            request_queue_size = 200

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def answer(text: str = "Answer: A", usage: object = None, **choice: Any) -> bytes:
    """The body of an ordinary answer."""
    said = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}
    counted = {"prompt_tokens": 9, "completion_tokens": 4} if usage is None else usage
    return json.dumps({"choices": [said], "usage": counted}).encode()
