"""How a vLLM server is started: its command line, its environment, and what is checked before.

A server wants a random key, which it gets by its environment: other users can read command lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from stepladder import models
from stepladder.config import Serve
from stepladder.errors import ServeError
from stepladder.forecast import memory
from stepladder.models.files import read_json
from stepladder.models.free_memory import free_on_host
from stepladder.workspace import write_atomic

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key that a server wants, one that was started or one under ``[serve] base_url``."""
MAX_BATCHED_TOKENS = 4096
"""Tokens of a forward pass. vLLM's default, 2,048 on most cards, favours latency over throughput. The memory they take
is part of ``memory.SERVER_BYTES``."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a block of the prefix cache on a CPU: few problems fill vLLM's default of 128."""
MAX_BOUND_CORES = 4
"""With so many cores or fewer, vLLM computes on all of them; by default it would reserve one of two for its server."""
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


def program(settings: Serve) -> Path:
    """The path of vLLM's program."""
    return settings.environment.absolute() / "bin" / "vllm"


def server_command(
    weights: Path, name: str, settings: Serve, cards: int, address: str, port: int, generation: Path
) -> list[str]:
    """The command line of a server.

    Args:
        weights: the model folder.
        name: the model name that the server lists.
        settings: ``[serve]``.
        cards: how many it uses; without any, this machine's cores.
        address: of this machine, where it listens.
        port: on which it listens.
        generation: the folder of its generation config.
    """
    arguments = [
        str(program(settings)), "serve", str(weights), "--served-model-name", name, "--host", address,
        "--port", str(port), "--max-model-len", str(settings.max_length), "--generation-config", str(generation),
        "--dtype", settings.dtype, "--load-format", "safetensors",  # never a pickle
        "--disable-uvicorn-access-log", "--disable-log-stats", "--max-num-seqs", str(memory.MAX_SEQUENCES),
        "--max-num-batched-tokens", str(max(MAX_BATCHED_TOKENS, settings.max_length)),
    ]  # fmt: skip
    arguments += ["--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"]
    if cards:  # with the utilisation even where kv_cache_gib is set: vLLM checks the free memory against it
        arguments += ["--tensor-parallel-size", str(cards), "--gpu-memory-utilization", str(settings.utilisation)]
    else:
        arguments += ["--enforce-eager", "--block-size", str(CPU_BLOCK_TOKENS)]
    cache_gib = settings.kv_cache_gib if cards else settings.kv_cache_gib or memory.HOST_CACHE_GIB
    if cache_gib is not None:
        arguments += ["--kv-cache-memory-bytes", str(round(cache_gib * 2**30))]
    return arguments


def server_environment(cards: int, environment: Mapping[str, str]) -> dict[str, str]:
    """An environment that names a server's cards, if it has any, with what vLLM needs beside."""
    own = {**environment, **OFFLINE_ENVIRONMENT}
    if cards:
        return own
    own.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it only takes whole GiB, and overrides the flag
    # Eager throughout: the first log-probabilities would wait seconds for torch.compile, which needs a C++ compiler.
    own["TORCHDYNAMO_DISABLE"] = "1"
    if len(cores := sorted(os.sched_getaffinity(0))) <= MAX_BOUND_CORES:
        own.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return own


def write_generation_config(weights: Path, folder: Path) -> None:
    """Write a generation config with the model's special tokens only: otherwise vLLM takes sampling settings that a
    request leaves out from the model's own."""
    path = weights / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    tokens = {
        key: config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if config.get(key) is not None
    }
    write_atomic(folder / "generation_config.json", json.dumps(tokens))


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


def check_memory(weights: Path, settings: Serve) -> None:
    """Check that host memory is not certainly too small for a server: one that the kernel kills logs no reason.

    Raises:
        ServeError: it is.
    """
    free = free_on_host()
    cache = (settings.kv_cache_gib or memory.HOST_CACHE_GIB) * 2**30
    needed = memory.weights_on_disk(weights) + cache + memory.SERVER_BYTES
    if free is not None and needed > free:
        raise ServeError(
            f"{weights}: a server needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; "
            "lower [serve] kv_cache_gib, or end other programs"
        )
