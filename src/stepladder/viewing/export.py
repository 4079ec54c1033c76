"""The pages of a run as files, to be sent or kept: the same templates, without a server."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request

from stepladder.context import Context
from stepladder.viewing.app import STATIC, Pages
from stepladder.workspace import digest

STYLE, REPORT = "view.css", "report.html"


class Crawl:
    """Names of files for pages, which are written in the order in which others link to them."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self.waiting: deque[tuple[str, str, str]] = deque()
        """Path, query and file name."""

    def link(self, path: str, /, **query: object) -> str:
        """The name of a page's file."""
        if path.startswith("/static/"):
            return STYLE
        if path == "/report":
            return REPORT
        given = {name: value for name, value in query.items() if value not in (None, "") and name != "back"}
        address = f"{path}?{urlencode(given)}"
        if address not in self._names:
            stem = path.strip("/") or "index"
            self._names[address] = f"{stem}-{digest(address)[:16]}.html" if given else f"{stem}.html"
            self.waiting.append((path, urlencode(given), self._names[address]))
        return self._names[address]


def export(context: Context, folder: Path) -> int:
    """Write every page that the run's page leads to, and return their number. ``folder`` is a new one.

    Raises:
        OSError: it exists, or cannot be written.
    """
    folder.mkdir()
    crawl = Crawl()
    pages = Pages(context, crawl.link)
    makers = {
        "/": pages.run, "/questions": pages.questions, "/question": pages.question, "/decisions": pages.decisions,
        "/compare": pages.compare,
    }  # fmt: skip
    crawl.link("/")
    count = 0
    while crawl.waiting:
        path, query, name = crawl.waiting.popleft()
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
        (folder / name).write_bytes(bytes(makers[path](Request(scope)).body))
        count += 1
    shutil.copy(STATIC / STYLE, folder / STYLE)
    report = context.workspace.folder / "report" / REPORT
    if report.is_file():
        shutil.copy(report, folder / REPORT)
    return count
