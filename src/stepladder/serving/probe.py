"""Whether a server on a port of this node is the one that was started, healthy, and open to nobody else."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request

import psutil

TIMEOUT_SECONDS = 2.0
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without a proxy: these addresses are on this node."""


def free_port(address: str) -> int:
    """A port of an address of this node that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def is_ours(pid: int, port: int) -> bool:
    """Whether a process, or one that it started, listens on the port. Anybody else who took the port first would be
    sent questions and key."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return False
    return any(_listens(process, port) for process in processes)


def is_healthy(address: str, port: int) -> bool:
    """Whether vLLM says that it can answer."""
    return _status(address, port, "/health") == http.client.OK


def refuses_strangers(address: str, port: int) -> bool:
    """Whether the server asks for its key."""
    return _status(address, port, "/v1/models") == http.client.UNAUTHORIZED


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in process.net_connections("tcp")
        )
    except psutil.Error:  # it has ended, or is not this user's
        return False


def _status(address: str, port: int, path: str) -> int | None:
    """The status of a reply to a request without a key; None without a reply."""
    try:
        with direct.open(f"http://{address}:{port}{path}", timeout=TIMEOUT_SECONDS) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None
