"""The vLLM servers of a model: started, watched and stopped, one for each card (or for each group of cards that share a
model), on this machine or on the nodes of a cluster.

A server that ends is started again, under another address. Clients read the current addresses from a file
(ask/remote/servers.py); the answers so far are in the ledger.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stepladder.config import Serve
from stepladder.errors import ServeError
from stepladder.models.files import refuse_code
from stepladder.nodes import THIS_MACHINE, Ended, Nodes, Running, Slot
from stepladder.nodes.here import Here
from stepladder.serving.cards import cards_by_server, taken
from stepladder.serving.probe import free_port
from stepladder.serving.server import POLL_SECONDS, ServerJob, command, news
from stepladder.serving.vllm import KEY_VARIABLE, program
from stepladder.workspace import refuse_link, write_atomic

MAX_RESTARTS = 3
"""Of a server that had been healthy."""
MAX_LOSSES = 10
"""Starts of a server in a row that ended with its node before it was healthy."""
MAX_PORT_TRIES = 5
"""Starts on another port: another process may take a port between the check and the start."""
JOIN_SECONDS = 2.0
"""Between two looks for nodes that have joined."""
FAILURE_PATTERNS = (
    (r"address already in use", "port"),
    (r"larger than the available KV cache memory|No available memory for the cache blocks|KV cache is needed", "cache"),
    (r"out of memory|Cannot allocate memory|less than desired GPU memory utilization", "memory"),
)
"""Patterns in a server's log, and the kind of failure that they show."""

Note = Callable[[str], None]


class Fleet:
    """The running servers of one model. Use as a context manager: it is entered once every server is healthy, on a
    cluster once the first is.

    Args:
        weights: the model folder.
        name: the model name that the servers list.
        settings: ``[serve]``.
        folder: for logs and the file of addresses.
        note: called with a message when a server is restarted.
        stop: once it is set, the servers are stopped, even while they start or answer.
        nodes: where they run, by default on this machine.

    Raises:
        ServeError: on entering, a server did not become healthy; the message says why.
        ModelError: on entering, the folder brings code that vLLM may run.
    """

    def __init__(
        self,
        weights: Path,
        name: str,
        settings: Serve,
        folder: Path,
        note: Note = lambda message: None,
        stop: threading.Event | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self._weights, self._name, self._settings, self._folder = weights, name, settings, folder
        self._nodes, self._note = nodes or Here(self._share_out), note
        self.addresses = folder / "addresses.txt"
        """File with the base URLs of the healthy servers, one a line."""
        self.key = secrets.token_urlsafe()
        """The API key that the servers want."""
        self.failure: str | None = None
        """Why a server was given up, or None; on a cluster, why the last one was."""
        self._urls: dict[int, str] = {}
        self._changed = threading.Condition()  # its lock may be taken twice by one thread
        self._closing = threading.Event()
        self._stop = stop or self._closing
        self._threads: list[threading.Thread] = []
        self._started = self._given_up = 0

    def __enter__(self) -> Fleet:
        if not program(self._settings).is_file():
            raise ServeError(f"[serve] environment {self._settings.environment}: no vllm in it; run 'make serve-env'")
        refuse_code(self._weights, "vLLM")
        slots = self._nodes.slots(self._settings.tensor_parallel)
        refuse_link(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.addresses, "")
        if not slots:
            self._note("no node of the cluster has room for a server yet; waiting for one")
        for slot in slots:
            self._start(slot)
        if self._nodes.is_elastic:
            self._run(self._welcome)
        needed = 1 if self._nodes.is_elastic else len(slots)
        try:
            with self._changed:
                while len(self._urls) < needed and self.failure is None and not self._is_over:
                    self._changed.wait(POLL_SECONDS)  # a wait without timeout would block Ctrl+C
            if self._is_over:
                raise ServeError(f"the vLLM servers of {self._weights} were stopped")
            if self.failure is not None:
                raise ServeError(self.failure)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop every server and wait until its processes have ended."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    @property
    def _is_over(self) -> bool:
        return self._closing.is_set() or self._stop.is_set()

    def _share_out(self, _: int) -> list[tuple[str, ...]]:
        """The cards of this machine, by server; those that are left out are said."""
        groups = cards_by_server(self._settings)
        for line in taken(1 - self._settings.utilisation):
            self._note(f"{line}, so it is left out")
        return groups

    def _start(self, slot: Slot) -> None:
        """Keep one more server running."""
        self._run(self._keep_running, slot, self._folder / f"server-{self._started}.log")
        self._started += 1

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except Exception as error:
                self._fail(f"the vLLM servers of {self._weights} are no longer watched ({error})")
                raise

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _welcome(self) -> None:
        """Keep as many servers running as nodes have room for, more when nodes join. Those of a node that is lost wait
        for another one."""
        while not self._closing.wait(JOIN_SECONDS) and not self._is_over:
            for slot in self._nodes.slots(self._settings.tensor_parallel)[self._started :]:
                self._start(slot)

    def _keep_running(self, slot: Slot, log: Path) -> None:
        """Start a server, and again whenever it ends, until the fleet is closed or the server is given up."""
        job = ServerJob(weights=self._weights.absolute(), name=self._name, serve=self._settings, cards=slot.cards)
        environment = {KEY_VARIABLE: self.key}
        restarts = losses = ports_taken = 0
        while not self._is_over:
            offset = log.stat().st_size if log.exists() else 0
            with self._nodes.running(slot, command(job), environment, log) as running:
                ended, url = self._watch(running, log, offset)
            if self._is_over:
                return
            said = news(_since(log, offset), self.key)
            reason, kind = _failure_reason(log, offset, self._settings)
            reason = ended.reason or (said.failure if said and said.failure else reason)
            losses = 0 if url else losses + 1
            if ended.code is None and losses <= MAX_LOSSES:
                self._note(f"a server of {self._name} was lost ({reason}) and is started again")
                self._closing.wait(JOIN_SECONDS)
            elif url is not None and restarts < MAX_RESTARTS:
                restarts += 1
                self._note(f"a server of {self._name} ended ({reason}) and is started again")
            elif url is None and kind == "port" and ports_taken < MAX_PORT_TRIES:
                ports_taken += 1
            else:
                self._give_up(f"the vLLM server of {self._weights} {'ended' if url else 'did not start'}: {reason}")
                return

    def _watch(self, running: Running, log: Path, offset: int) -> tuple[Ended, str | None]:
        """Wait until a server ends, or the fleet is being closed, and list its address meanwhile; returns how it ended
        and the address, if it had one."""
        url, number = None, id(running)
        while (ended := running.poll()) is None and not self._is_over:
            if url is None and (said := news(_since(log, offset), self.key)) is not None and said.url is not None:
                url = said.url
                self._list(number, url)
            time.sleep(POLL_SECONDS)
        self._list(number, None)
        return ended or Ended(None, "it was stopped"), url

    def _list(self, number: int, url: str | None) -> None:
        """List a server's address, or no more."""
        with self._changed:
            self._urls.pop(number, None)
            if url is not None:
                self._urls[number] = url
            self._write_addresses(self._urls.values())

    def _give_up(self, reason: str) -> None:
        """Do without a server. On a cluster others may do its work, until the last one is given up."""
        with self._changed:
            self._given_up += 1
            if self._nodes.is_elastic and self._given_up < self._started:
                self._note(f"{reason}; the others go on without it")
                return
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        """Let whoever asks or waits for servers end with this reason."""
        with self._changed:
            # Clients wait while the file is empty; with an address where nobody listens, they fail.
            self._write_addresses(self._urls.values() or [f"http://{THIS_MACHINE}:{free_port(THIS_MACHINE)}/v1"])
            self.failure = reason  # last, since it is read without the lock

    def _write_addresses(self, urls: Iterable[str]) -> None:
        write_atomic(self.addresses, "".join(f"{url}\n" for url in urls))
        self._changed.notify_all()


def _since(log: Path, offset: int) -> str:
    """What a log holds from an offset on."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _failure_reason(log: Path, offset: int, settings: Serve) -> tuple[str, str]:
    """Why a server ended, by its log from ``offset`` on: a message, and the kind of failure (``port``, ``cache``,
    ``memory``, ``other``)."""
    text = _since(log, offset)
    messages: Mapping[str, str] = {
        "port": "its port was taken by another process",
        "cache": f"keys and values of {settings.max_length} tokens do not fit; lower [serve] max_length",
        "memory": "its memory is too small; use fewer bits, a smaller [serve] max_length, or more cards",
    }
    for pattern, kind in FAILURE_PATTERNS:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{messages[kind]} (see {log})", kind
    lines = [line for line in text.splitlines() if re.search(r"\b\w*(?:Error|Exception)\b: ", line)]
    last = re.sub(r"^.*?(?=\b\w*(?:Error|Exception)\b: )", "", lines[-1])[:300] if lines else "its log gives no reason"
    return f"{last.strip()} (see {log})", "other"
