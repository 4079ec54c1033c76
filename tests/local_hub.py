"""A small Hugging Face hub (and ModelScope) on this machine: what ``snapshot_download`` asks of one, and no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

NEW = "0" * 39 + "2"
"""The commit that is called main."""

Repos = Mapping[tuple[str, str], Mapping[str, str | bytes]]
"""Files by name, of each repository at each commit."""


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


class Handler(BaseHTTPRequestHandler):
    """What ``snapshot_download`` asks of a hub: what a revision is, its files, and the bytes of each."""

    server: Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        self.server.asked.append(f"{self.command} /{'/'.join(parts)}")
        if parts[:2] == ["api", "v1"] and parts[2] in ("models", "datasets"):
            return self._answer_as_modelscope("/".join(parts[3:5]))
        is_api = parts[0] == "api"
        owner, name, kind, revision, *rest = [*parts[2 if is_api else parts[0] == "datasets" :], *[""] * 4]
        commit = NEW if revision == "main" else revision
        repo, file = f"{owner}/{name}", "/".join(part for part in rest if part)
        if all(repo != known for known, _ in self.server.repos):
            return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        if (repo, commit) not in self.server.repos:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        files = self.server.repos[repo, commit]
        if is_api:
            tree = [entry(path, text) for path, text in files.items()]
            about = {"id": repo, "sha": commit} if kind == "revision" else tree
            return self._send(200, {}, json.dumps(about).encode())
        if repo == "school/gated":
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}")
        headers = {"ETag": f'"{entry(file, files[file])["oid"]}"', "X-Repo-Commit": commit}
        return self._send(200, headers, content(files[file]))

    def _answer_as_modelscope(self, repo: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        files = self.server.repos.get((repo, query["Revision"][0]))
        if files is None:
            return self._send(404, {}, b"{}")
        if "FilePath" in query:
            return self._send(200, {}, content(files[query["FilePath"][0]]))
        listed = [{"Path": path, "Type": "blob", "Size": len(text)} for path, text in files.items()]
        return self._send(200, {}, json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def content(file: str | bytes) -> bytes:
    return file.encode() if isinstance(file, str) else file


def entry(path: str, file: str | bytes) -> dict[str, object]:
    held = content(file)
    return {"type": "file", "path": path, "size": len(held), "oid": hashlib.sha1(held).hexdigest()}  # noqa: S324


class Server(ThreadingHTTPServer):
    """The hub for the length of a ``with``; it remembers what it was asked."""

    def __init__(self, repos: Repos) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self._thread.join()
        super().__exit__(kind, error, trace)
