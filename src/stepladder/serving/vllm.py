"""vLLM servers, one for each card (or for each group of cards that share a model).

A server runs under supervise.py: when this process ends, even if it is killed, the server and vLLM's engine processes
end too. A server that dies is started again on another port. Clients read the current addresses from a file
(ask/remote/servers.py); the answers so far are in the ledger.

A server listens on this machine only and wants a random key, which it gets by its environment: other users can read
command lines. Its address is used once the process that was started listens there (``probe``).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from stepladder import models
from stepladder.config import Serve
from stepladder.errors import ServeError
from stepladder.forecast import memory
from stepladder.models.files import read_json, refuse_code
from stepladder.models.free_memory import free_on_host
from stepladder.serving.cards import cards_by_server, taken
from stepladder.serving.probe import free_port, is_healthy, is_ours, refuses_strangers
from stepladder.supervise import child_environment, supervised
from stepladder.workspace import refuse_link, write_atomic

MAX_RESTARTS = 3
"""Of a server that had been healthy."""
MAX_PORT_TRIES = 5
"""Starts on another port: another process may take a port between the check and the start."""
MAX_BATCHED_TOKENS = 4096
"""Tokens of a forward pass. vLLM's default, 2,048 on most cards, favours latency over throughput. The memory they take
is part of ``memory.SERVER_BYTES``."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a block of the prefix cache on a CPU: few problems fill vLLM's default of 128."""
MAX_BOUND_CORES = 4
"""With so many cores or fewer, vLLM computes on all of them; by default it would reserve one of two for its server."""
POLL_SECONDS = 0.3
"""Between two checks of a server."""
OFFLINE_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "FLASHINFER_NO_DOWNLOAD": "1",
}
"""Turns off telemetry and downloads."""
FAILURE_PATTERNS = (
    (r"address already in use", "port"),
    (r"larger than the available KV cache memory|No available memory for the cache blocks|KV cache is needed", "cache"),
    (r"out of memory|Cannot allocate memory|less than desired GPU memory utilization", "memory"),
)
"""Patterns in a server's log, and the kind of failure that they show."""

Note = Callable[[str], None]


class Fleet:
    """The running servers of one model. Use as a context manager.

    Args:
        weights: the model folder.
        name: the model name that the servers list.
        settings: ``[serve]``.
        folder: for logs and the file of addresses.
        note: called with a message when a server is restarted.
        stop: once it is set, the servers are stopped, even while they start or answer.

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
    ) -> None:
        self._weights, self._name, self._settings, self._folder, self._note = weights, name, settings, folder, note
        self.addresses = folder / "addresses.txt"
        """File with the base URLs of the healthy servers, one a line."""
        self.key = secrets.token_urlsafe()
        """The API key that the servers want."""
        self.failure: str | None = None
        """Why a server was given up, or None."""
        self._urls: dict[int, str] = {}
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._stop = stop or self._closing
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Fleet:
        program = self._settings.environment.absolute() / "bin" / "vllm"
        if not program.is_file():
            raise ServeError(f"[serve] environment {self._settings.environment}: no vllm in it; run 'make serve-env'")
        refuse_code(self._weights, "vLLM")
        groups = cards_by_server(self._settings)
        if groups == [()]:
            check_kernels(self._weights)
            _check_memory(self._weights, self._settings)
        for line in taken(1 - self._settings.utilisation):
            self._note(f"{line}, so it is left out")
        refuse_link(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.addresses, "")
        generation = _write_generation_config(self._weights, self._folder / "generation")
        for slot, cards in enumerate(groups):
            arguments = (slot, cards, program, generation)
            self._threads.append(threading.Thread(target=self._keep_running, args=arguments, daemon=True))
        try:
            for thread in self._threads:
                thread.start()
            with self._changed:
                while len(self._urls) < len(groups) and self.failure is None and not self._is_over:
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
            if thread.ident is not None:
                thread.join()

    @property
    def _is_over(self) -> bool:
        return self._closing.is_set() or self._stop.is_set()

    def _keep_running(self, slot: int, cards: tuple[str, ...], program: Path, generation: Path) -> None:
        """Start a server, and again whenever it ends, until the fleet is closed or the server is given up."""
        restarts = ports_taken = 0
        log = self._folder / f"server-{slot}.log"
        while not self._is_over:
            port = free_port()
            arguments, environment = server_command(
                self._weights, self._name, self._settings, program, cards, port, generation
            )
            log_offset = log.stat().st_size if log.exists() else 0
            with supervised(arguments, log, environment | {"VLLM_API_KEY": self.key}) as child:
                healthy = self._wait_until_healthy(child, port)
                if healthy and not refuses_strangers(port):
                    self._give_up(f"the vLLM server of {self._weights} does not ask for its key; update vLLM")
                    return
                if healthy:
                    self._set_url(slot, f"http://127.0.0.1:{port}/v1")
                    while child.poll() is None and not self._is_over:
                        time.sleep(POLL_SECONDS)
                    self._set_url(slot, None)
            if self._is_over:
                return
            reason, kind = _failure_reason(log, log_offset, self._settings)
            if healthy and restarts < MAX_RESTARTS:
                restarts += 1
                self._note(f"a server of {self._name} ended ({reason}) and is started again")
            elif not healthy and kind == "port" and ports_taken < MAX_PORT_TRIES:
                ports_taken += 1
            else:
                self._give_up(f"the vLLM server of {self._weights} {'ended' if healthy else 'did not start'}: {reason}")
                return

    def _wait_until_healthy(self, child: subprocess.Popen[bytes], port: int) -> bool:
        """Wait until a server is healthy; False if it ended, took too long, or the fleet is being closed."""
        deadline = time.monotonic() + self._settings.startup
        while child.poll() is None and time.monotonic() < deadline and not self._is_over:
            if is_ours(child.pid, port) and is_healthy(port):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _set_url(self, slot: int, url: str | None) -> None:
        with self._changed:
            self._urls.pop(slot, None)
            if url is not None:
                self._urls[slot] = url
            self._write_addresses(self._urls.values())

    def _give_up(self, reason: str) -> None:
        with self._changed:
            # Clients wait while the file is empty; with an address where nobody listens, they fail.
            self._write_addresses(self._urls.values() or [f"http://127.0.0.1:{free_port()}/v1"])
            self.failure = reason  # last, since it is read without the lock

    def _write_addresses(self, urls: Iterable[str]) -> None:
        write_atomic(self.addresses, "".join(f"{url}\n" for url in urls))
        self._changed.notify_all()


def server_command(
    weights: Path, name: str, settings: Serve, program: Path, cards: Sequence[str], port: int, generation: Path
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a server. ``generation`` is the folder of its generation config."""
    arguments = [
        str(program), "serve", str(weights), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", str(settings.max_length), "--generation-config", str(generation), "--dtype", settings.dtype,
        "--load-format", "safetensors",  # never a pickle
        "--disable-uvicorn-access-log", "--disable-log-stats", "--max-num-seqs", str(memory.MAX_SEQUENCES),
        "--max-num-batched-tokens", str(max(MAX_BATCHED_TOKENS, settings.max_length)),
    ]  # fmt: skip
    arguments += ["--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"]
    if cards:  # with the utilisation even where kv_cache_gib is set: vLLM checks the free memory against it
        arguments += ["--tensor-parallel-size", str(len(cards)), "--gpu-memory-utilization", str(settings.utilisation)]
    else:
        arguments += ["--enforce-eager", "--block-size", str(CPU_BLOCK_TOKENS)]
    cache_gib = settings.kv_cache_gib if cards else settings.kv_cache_gib or memory.HOST_CACHE_GIB
    if cache_gib is not None:
        arguments += ["--kv-cache-memory-bytes", str(round(cache_gib * 2**30))]
    return arguments, server_environment(cards)


def server_environment(cards: Sequence[str]) -> dict[str, str]:
    """Environment variables with which vLLM uses these cards, or without any this machine's cores."""
    environment = child_environment() | OFFLINE_ENVIRONMENT
    if cards:
        if "CUDA_VISIBLE_DEVICES" not in environment:  # then the cards' numbers are the driver's
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        environment.pop("HIP_VISIBLE_DEVICES", None)  # under ROCm vLLM takes either name, and not two answers
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        return environment
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it only takes whole GiB, and overrides the flag
    # Eager throughout: the first log-probabilities would wait seconds for torch.compile, which needs a C++ compiler.
    environment["TORCHDYNAMO_DISABLE"] = "1"
    if len(cores := sorted(os.sched_getaffinity(0))) <= MAX_BOUND_CORES:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return environment


def _write_generation_config(weights: Path, folder: Path) -> Path:
    """Write a generation config with the model's special tokens only: otherwise vLLM takes sampling settings that a
    request leaves out from the model's own. Returns the folder it is in."""
    path = weights / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    tokens = {
        key: config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if config.get(key) is not None
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "generation_config.json", json.dumps(tokens))
    return folder


def check_kernels(weights: Path | None) -> None:
    """Check that vLLM can compute a folder's weights on this CPU; None: any 4-bit weights. Version 0.32 has 4-bit
    kernels for AVX-512 and no others: it would start, and end at the first request.

    Raises:
        ServeError: it cannot.
    """
    config = None if weights is None else weights / "config.json"
    is_quantised = config is None or (config.exists() and "quantization_config" in read_json(config))
    if is_quantised and not models.has_avx512():
        raise ServeError(
            "vLLM computes 4-bit weights on cards and on CPUs with AVX-512, and this machine has neither; set "
            "[predict] engine = 'local'"
        )


def _check_memory(weights: Path, settings: Serve) -> None:
    """Raise ServeError if host memory is certainly too small: a server that the kernel kills logs no reason."""
    free = free_on_host()
    cache = (settings.kv_cache_gib or memory.HOST_CACHE_GIB) * 2**30
    needed = memory.weights_on_disk(weights) + cache + memory.SERVER_BYTES
    if free is not None and needed > free:
        raise ServeError(
            f"{weights}: a server needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; "
            "lower [serve] kv_cache_gib, or end other programs"
        )


def _failure_reason(log: Path, offset: int, settings: Serve) -> tuple[str, str]:
    """Why a server ended, by its log from ``offset`` on: a message, and the kind of failure (``port``, ``cache``,
    ``memory``, ``other``)."""
    text = log.read_bytes()[offset:].decode(errors="replace")
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
