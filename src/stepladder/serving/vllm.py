"""vLLM servers, one for each card (or for each group of cards that share a model), while a block lasts.

A server runs under supervise.py: when this process ends, however it ends, nothing of it is left, vLLM's engine
processes included. One that dies is started again on another port; whoever asks learns of it through a file of
addresses (ask/remote/servers.py), and what was answered is in the ledger.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from stepladder.config import Serve
from stepladder.errors import ServeError
from stepladder.forecast import memory
from stepladder.serving.cards import cards_by_server
from stepladder.supervise import supervised

RESTARTS = 3
"""How often a server that had been healthy is started again."""
PORTS = 5
"""Tries to find a free port; another process may take one between the look and the start."""
BATCH = 4096
"""Tokens computed at once: a server's own default, 2,048 on most cards, favours the first word over the last. What they
take of a card's memory is in ``memory.SERVER``."""
BLOCK = 32
"""Tokens whose keys and values are shared or not, on a CPU: a problem's text seldom has vLLM's own 128."""
HOST_CACHE = 2.0
"""GiB of KV cache in a host's memory, where nothing else is asked for."""
FEW_CORES = 4
"""Up to so many, vLLM computes on all of them: of two it would keep one for its server."""
LOOK = 0.3
"""Seconds between two looks at a server."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "FLASHINFER_NO_DOWNLOAD": "1",
}
"""Nothing phones home."""
FAILURES = (
    (r"address already in use", "port"),
    (r"larger than the available KV cache memory|No available memory for the cache blocks|KV cache is needed", "cache"),
    (r"out of memory|Cannot allocate memory|less than desired GPU memory utilization", "memory"),
)
"""What a server's log says of why it ended."""

Note = Callable[[str], None]


class Fleet:
    """The running servers of one model. Use as a context manager.

    Args:
        weights: the model folder.
        name: what the servers call it.
        settings: ``[serve]``.
        folder: where logs and the file of addresses go.
        note: called with a line about something worth knowing.
        stop: once it is set the servers end, whoever waits for them or asks them.

    Raises:
        ServeError: on entering, a server did not become healthy; the message says why.
    """

    def __init__(
        self,
        weights: Path,
        name: str,
        settings: Serve,
        folder: Path,
        note: Note = lambda line: None,
        stop: threading.Event | None = None,
    ) -> None:
        self._weights, self._name, self._settings, self._folder, self._note = weights, name, settings, folder, note
        self.addresses = folder / "addresses.txt"
        """A base URL a line, of those that are healthy just now."""
        self.failure: str | None = None
        """Why a server was given up."""
        self._urls: dict[int, str] = {}
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._stop = stop or self._closing
        self._keepers: list[threading.Thread] = []

    def __enter__(self) -> Fleet:
        program = self._settings.environment.absolute() / "bin" / "vllm"
        if not program.is_file():
            raise ServeError(f"[serve] environment {self._settings.environment}: no vllm in it; run 'make serve-env'")
        groups = cards_by_server(self._settings)
        if groups == [()]:
            _check_memory(self._weights, self._settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.addresses.write_text("", encoding="utf-8")
        stops = _stops(self._weights, self._folder / "generation")
        for slot, cards in enumerate(groups):
            arguments = (slot, cards, program, stops)
            self._keepers.append(threading.Thread(target=self._keep, args=arguments, daemon=True))
        try:
            for keeper in self._keepers:
                keeper.start()
            with self._changed:
                while len(self._urls) < len(groups) and self.failure is None and not self._is_over:
                    self._changed.wait(LOOK)  # with a timeout, so that Ctrl+C gets through
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
        """Stop every server and wait until nothing of them is left."""
        self._closing.set()
        for keeper in self._keepers:
            if keeper.ident is not None:
                keeper.join()

    @property
    def _is_over(self) -> bool:
        return self._closing.is_set() or self._stop.is_set()

    def _keep(self, slot: int, cards: tuple[str, ...], program: Path, stops: Path) -> None:
        """Start a server, and start it again when it ends, until the block is left or it is given up."""
        restarts = taken = 0
        log = self._folder / f"server-{slot}.log"
        while not self._is_over:
            port = _free_port()
            words, environment = command(self._weights, self._name, self._settings, program, cards, port, stops)
            begun = log.stat().st_size if log.exists() else 0
            with supervised(words, log, environment) as child:
                healthy = self._wait(child, port)
                if healthy:
                    self._say(slot, f"http://127.0.0.1:{port}/v1")
                    while child.poll() is None and not self._is_over:
                        time.sleep(LOOK)
                    self._say(slot, None)
            if self._is_over:
                return
            why, kind = _reason(log, begun, self._settings)
            if healthy and restarts < RESTARTS:
                restarts += 1
                self._note(f"a server of {self._name} ended ({why}) and is started again")
            elif not healthy and kind == "port" and taken < PORTS:
                taken += 1
            else:
                self._give_up(f"the vLLM server of {self._weights} {'ended' if healthy else 'did not start'}: {why}")
                return

    def _wait(self, child: subprocess.Popen[bytes], port: int) -> bool:
        """Wait until a server answers; False when it ended, took too long, or is not wanted any more."""
        deadline = time.monotonic() + self._settings.startup
        while child.poll() is None and time.monotonic() < deadline and not self._is_over:
            if _is_healthy(port):
                return True
            time.sleep(LOOK)
        return False

    def _say(self, slot: int, url: str | None) -> None:
        with self._changed:
            self._urls.pop(slot, None)
            if url is not None:
                self._urls[slot] = url
            self._write(self._urls.values())

    def _give_up(self, why: str) -> None:
        with self._changed:
            # Whoever asks waits while there is no address, and fails where nobody listens.
            self._write(self._urls.values() or [f"http://127.0.0.1:{_free_port()}/v1"])
            self.failure = why  # last, since it is looked at without the lock

    def _write(self, urls: Iterable[str]) -> None:
        whole = self.addresses.with_suffix(".new")
        whole.write_text("".join(f"{url}\n" for url in urls), encoding="utf-8")
        whole.replace(self.addresses)
        self._changed.notify_all()


def command(
    weights: Path, name: str, settings: Serve, program: Path, cards: Sequence[str], port: int, stops: Path
) -> tuple[list[str], dict[str, str]]:
    """The words and the environment that start a server."""
    words = [
        str(program), "serve", str(weights), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", str(settings.max_length), "--generation-config", str(stops), "--dtype", settings.dtype,
        "--disable-uvicorn-access-log", "--max-num-seqs", str(memory.SEQUENCES),
        "--max-num-batched-tokens", str(max(BATCH, settings.max_length)),
    ]  # fmt: skip
    words += ["--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"]
    if cards:  # whose free memory is checked against the share, even where the cache is given
        words += ["--tensor-parallel-size", str(len(cards)), "--gpu-memory-utilization", str(settings.utilisation)]
    else:
        words += ["--enforce-eager", "--block-size", str(BLOCK)]
    cache = settings.kv_cache_gib if cards else settings.kv_cache_gib or HOST_CACHE
    if cache is not None:
        words += ["--kv-cache-memory-bytes", str(round(cache * 2**30))]
    return words, surroundings(cards)


def surroundings(cards: Sequence[str]) -> dict[str, str]:
    """The environment in which vLLM uses these cards, or without any this machine's cores."""
    environment = {**os.environ, **QUIET}
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        return environment
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and takes precedence over the flag
    if len(cores := sorted(os.sched_getaffinity(0))) <= FEW_CORES:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return environment


def _stops(weights: Path, folder: Path) -> Path:
    """A folder with a generation config that says where answers end and nothing else: vLLM would otherwise sample as
    the base's makers suggest wherever a request says nothing."""
    path = weights / "generation_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {key: known[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if known.get(key) is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def _check_memory(weights: Path, settings: Serve) -> None:
    """Raises ServeError where a CPU's memory is surely too small: a server that is killed says nothing."""
    free = memory.free()
    needed = memory.weights_on_disk(weights) + (settings.kv_cache_gib or HOST_CACHE) * 2**30 + memory.SERVER
    if free is not None and needed > free:
        raise ServeError(
            f"{weights}: a server needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; "
            "lower [serve] kv_cache_gib, or end something"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _reason(log: Path, begun: int, settings: Serve) -> tuple[str, str]:
    """Why a server ended, in words and as a kind, from what it wrote since ``begun``."""
    said = log.read_bytes()[begun:].decode(errors="replace")
    words: Mapping[str, str] = {
        "port": "its port was taken by another process",
        "cache": f"keys and values of {settings.max_length} tokens do not fit; lower [serve] max_length",
        "memory": "its memory is too small; take fewer bits, a smaller [serve] max_length, or more cards",
    }
    for pattern, kind in FAILURES:
        if re.search(pattern, said, re.IGNORECASE):
            return f"{words[kind]} (see {log})", kind
    lines = [line for line in said.splitlines() if re.search(r"\b\w*(?:Error|Exception)\b: ", line)]
    last = re.sub(r"^.*?(?=\b\w*(?:Error|Exception)\b: )", "", lines[-1])[:300] if lines else "it says no reason"
    return f"{last.strip()} (see {log})", "other"
