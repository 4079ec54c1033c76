"""The number format that is computed in: what a setting comes to on this machine, and what the hardware is best at."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stepladder.config import Dtype
from stepladder.errors import UserError
from stepladder.models.emulation import emulate_bfloat16
from stepladder.models.libraries import require
from stepladder.workspace import digest

if TYPE_CHECKING:
    import torch

AUTO = "STEPLADDER_DTYPE"
"""Environment variable that says which number format ``auto`` stands for, instead of what the hardware is best at."""


def own_dtype(folder: Path) -> torch.dtype:
    """The number format a model's weights are stored in."""
    require()
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return cast("torch.dtype", getattr(torch, name))


def has_cuda() -> bool:
    """Whether there is a card to compute on."""
    require()
    import torch

    return torch.cuda.is_available()


def compute_dtype(dtype: Dtype = "auto") -> torch.dtype:
    """What is computed in; ``auto`` is bfloat16 where the hardware multiplies it, float32 elsewhere: a CPU without
    AVX512-BF16 or AMX has to emulate it (``emulation``).

    Raises:
        UserError: the environment variable :data:`AUTO` names no number format.
    """
    require()
    import torch

    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto" and (forced := os.environ.get(AUTO)):
        if forced not in formats:
            raise UserError(f"{AUTO}={forced!r}: is no number format; take {' or '.join(formats)}, or leave it out")
        return formats[forced]
    if dtype != "auto":
        return formats[dtype]
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether a card or this CPU has instructions for products in bfloat16."""
    require()
    import torch

    return has_cuda() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_name(dtype: Dtype = "auto") -> str:
    """The number format that a setting comes to on this machine, as settings name it."""
    return str(compute_dtype(dtype)).removeprefix("torch.")


def machine(dtype: Dtype = "auto") -> dict[str, str]:
    """What results of computing here depend on to the bit: number format, hardware, libraries, threads."""
    require()
    import torch

    if has_cuda():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        kept = [line for line in lines if line.startswith(("model name", "model\t", "cpu family", "flags"))]
        hardware = f"{torch.backends.cpu.get_cpu_capability()} {digest(kept)[:16]}"
    libraries = f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}"
    threads = str(torch.get_num_threads())
    return {"dtype": dtype_name(dtype), "hardware": hardware, "libraries": libraries, "threads": threads}


def ready_for(dtype: Dtype) -> torch.dtype:
    """The number format that a setting comes to, in which this process can compute from now on."""
    found = compute_dtype(dtype)
    if found.itemsize == 2 and not multiplies_bfloat16():
        emulate_bfloat16()
    return found
