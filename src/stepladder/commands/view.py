"""``stepladder view``: a run in a browser, and the queue of labels to be decided."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from rich.console import Console

from stepladder.context import Context
from stepladder.errors import MissingExtra, UserError
from stepladder.terminal import say
from stepladder.workspace import unwritable

HOST = "127.0.0.1"


def view(config: Path, runs: Path, port: int, export_to: Path | None, console: Console) -> None:
    """Serve a run's pages on this machine until interrupted, or write them into a new folder.

    Raises:
        MissingExtra: the libraries for it are not installed.
        UserError: the port is taken, or the folder cannot be written.
    """
    try:
        import uvicorn

        from stepladder.viewing.app import Pages
        from stepladder.viewing.export import export
        from stepladder.viewing.guard import Guard
    except ImportError as error:
        raise MissingExtra(str(error.name), "'stepladder[web]'") from None
    context = Context.open(config, runs)
    if export_to is not None:
        try:
            count = export(context, export_to)
        except FileExistsError:
            raise UserError(f"{export_to}: exists; name a folder that does not") from None
        except OSError as error:
            raise unwritable(export_to, error) from None
        say(console, f"Wrote {export_to}: {count:,} pages; open {export_to / 'index.html'}")
        return
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); give --port another one") from None
    port, token = listener.getsockname()[1], secrets.token_urlsafe()
    app = Guard(Pages(context).app(), port, token)
    say(console, f"Open http://{HOST}:{port}/?token={token}")
    say(console, "Ctrl+C ends it.")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=1))
    server.run(sockets=[listener])
