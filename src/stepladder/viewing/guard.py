"""Who may use the pages: whoever has the token, from this machine, through the address that was printed.

Other sites may name this address in links and forms, or resolve a name of theirs to it (DNS rebinding): so Host and
Origin must be exactly ours, and the token is in a cookie that browsers do not send for other sites.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 100_000
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with "no-referrer" a form's Origin would be "null"
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Lets requests through to an application that come from a page of ours.

    Args:
        app: the application.
        port: that it is served on.
        token: what a browser has to know.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self._app, self._token = app, token
        self._cookie = f"stepladder-{port}"
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope, receive)
        answer = self._refused(request) or self._welcomed(request)
        await (self._app if answer is None else answer)(scope, receive, guarded)

    def _refused(self, request: Request) -> Response | None:
        """Why a request is not answered, whoever sends it."""
        if request.headers.getlist("host") not in [[host] for host in self._hosts]:
            return _no("This is not the address that 'stepladder view' printed.")
        if request.method not in ("GET", "HEAD", "POST"):
            return _no("Pages are read and decisions are posted; nothing else.", 405)
        if request.method == "POST":
            if request.headers.getlist("origin") != [f"http://{request.headers['host']}"]:
                return _no("This was sent by a page of another site.")
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                return _no(f"More than {MAX_BODY_BYTES:,} bytes are not taken.", 413)
        return None

    def _welcomed(self, request: Request) -> Response | None:
        """None for a browser that has the token. One that brings it gets a cookie, and the address without it."""
        if _same(request.cookies.get(self._cookie, ""), self._token):
            return None
        if request.method == "GET" and _same(request.query_params.get("token", ""), self._token):
            rest = [pair for pair in request.query_params.multi_items() if pair[0] != "token"]
            response = RedirectResponse(f"{request.url.path}?{urlencode(rest)}" if rest else request.url.path, 303)
            response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return response
        return _no("Open the address that 'stepladder view' printed; it ends in a token.")


def _no(reason: str, status: int = 403) -> Response:
    return PlainTextResponse(f"{reason}\n", status)


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
