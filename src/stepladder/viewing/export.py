"""The pages of a run as files, to be sent or kept: the same templates, without a server."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path

from starlette.requests import Request

from stepladder.context import Context
from stepladder.stages.report import HTML
from stepladder.viewing.app import STATIC, Pages, served_at
from stepladder.workspace import digest

STYLE = "view.css"


class Crawl:
    """Names of files for pages, which are written in the order in which others link to them."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """By the address where the page would be served."""
        self.waiting: deque[str] = deque()
        """Addresses of pages that are not written yet."""

    def link(self, path: str, /, **query: object) -> str:
        """The name of a page's file."""
        if path.startswith("/static/"):
            return STYLE
        if path == "/report":
            return HTML
        address = served_at(path, **query | {"back": None})
        if address not in self.names:
            stem, _, given = (address.strip("/") or "index").partition("?")
            self.names[address] = f"{stem}-{digest(address)[:16]}.html" if given else f"{stem}.html"
            self.waiting.append(address)
        return self.names[address]


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
    while crawl.waiting:
        address = crawl.waiting.popleft()
        path, _, query = address.partition("?")
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
        (folder / crawl.names[address]).write_bytes(bytes(makers[path](Request(scope)).body))
    shutil.copy(STATIC / STYLE, folder / STYLE)
    report = context.workspace.folder / "report" / HTML
    if report.is_file():
        shutil.copy(report, folder / HTML)
    return len(crawl.names)
