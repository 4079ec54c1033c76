"""One vLLM server on the node where this process runs: ``python -m stepladder.serving.server JOB``.

It finds a port, starts vLLM, and says in a line of its output where the server listens, once that is the server that
was started, healthy, and open to nobody without the key; or why there is none. It ends when the server does.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stepladder.config import Serve
from stepladder.errors import UserError
from stepladder.nodes import NODE_ADDRESS
from stepladder.records import Record
from stepladder.serving.probe import free_port, is_healthy, is_ours, refuses_strangers
from stepladder.serving.vllm import (
    KEY_VARIABLE,
    check_kernels,
    check_memory,
    server_command,
    server_environment,
    write_generation_config,
)

POLL_SECONDS = 0.3
"""Between two checks of a server."""


class ServerJob(Record):
    """A server that is to run."""

    weights: Path
    """The model folder, by its path on the node."""
    name: str
    """The model name that the server lists."""
    serve: Serve
    cards: int


class News(Record):
    """What a server's process says of it, in a line of its output."""

    url: str | None = None
    """Where it answers."""
    failure: str | None = None
    """Why it is not used."""


def command(job: ServerJob) -> list[str]:
    """The command line of a server's process."""
    return [sys.executable, "-m", "stepladder.serving.server", job.model_dump_json()]


def news(output: str, key: str) -> News | None:
    """What a server's process has said last; only one that has the server's key can say it."""
    marked = [line for line in output.splitlines() if line.startswith(_mark(key))]
    return News.model_validate_json(marked[-1].removeprefix(_mark(key))) if marked else None


def _mark(key: str) -> str:
    return f"stepladder {hashlib.sha256(key.encode()).hexdigest()}: "


def run(job: ServerJob) -> int:
    """Run a server until it ends; returns its exit code."""
    key, address = os.environ[KEY_VARIABLE], os.environ[NODE_ADDRESS]

    def say(**words: str) -> None:
        print(f"{_mark(key)}{News(**words).model_dump_json()}", flush=True)

    try:
        if not job.cards:
            check_kernels(job.weights)
            check_memory(job.weights, job.serve)
    except UserError as error:
        say(failure=str(error))
        return error.exit_code
    with tempfile.TemporaryDirectory(prefix="stepladder-") as folder:
        write_generation_config(job.weights, Path(folder))
        port = free_port(address)
        words = server_command(job.weights, job.name, job.serve, job.cards, address, port, Path(folder))
        server = subprocess.Popen(words, env=server_environment(job.cards, os.environ))  # noqa: S603
        try:
            deadline = time.monotonic() + job.serve.startup
            while not (is_ours(server.pid, port) and is_healthy(address, port)):
                if server.poll() is not None:
                    return server.returncode
                if time.monotonic() > deadline:
                    say(failure=f"it was not healthy within {job.serve.startup:g} s; raise [serve] startup")
                    return 1
                time.sleep(POLL_SECONDS)
            if not refuses_strangers(address, port):
                say(failure="it does not ask for its key; update vLLM")
                return 1
            say(url=f"http://{address}:{port}/v1")
            return server.wait()
        finally:
            server.kill()


if __name__ == "__main__":
    sys.exit(run(ServerJob.model_validate_json(sys.argv[1])))
