"""The number format to compute in: what a setting means on this machine, and what the hardware supports."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stepladder.config import Dtype
from stepladder.errors import UserError
from stepladder.models.emulation import emulate_bfloat16
from stepladder.models.files import read_json
from stepladder.models.libraries import require
from stepladder.workspace import digest

if TYPE_CHECKING:
    import torch

DTYPE_VARIABLE = "STEPLADDER_DTYPE"
"""Environment variable that sets the number format for ``auto``, whatever the hardware supports."""


def own_dtype(folder: Path) -> torch.dtype:
    """The number format a model's weights are stored in."""
    require()
    import torch

    config = read_json(folder / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return cast("torch.dtype", getattr(torch, name))


def has_cuda() -> bool:
    """Whether there is a CUDA device."""
    require()
    import torch

    return torch.cuda.is_available()


def compute_dtype(dtype: Dtype = "auto") -> torch.dtype:
    """The number format to compute in. ``auto`` is bfloat16 where the hardware multiplies it and float32 elsewhere, as
    a CPU without AVX512-BF16 or AMX has to emulate bfloat16 (``emulation``).

    Raises:
        UserError: the environment variable :data:`DTYPE_VARIABLE` does not name a number format.
    """
    require()
    import torch

    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto" and (forced := os.environ.get(DTYPE_VARIABLE)):
        if forced not in formats:
            raise UserError(
                f"{DTYPE_VARIABLE}={forced!r}: not a number format; set it to {' or '.join(formats)}, or unset it"
            )
        return formats[forced]
    if dtype != "auto":
        return formats[dtype]
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether a CUDA device or this CPU has instructions for products in bfloat16."""
    require()
    import torch

    return has_cuda() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_name(dtype: Dtype = "auto") -> str:
    """The name of the number format that a setting means on this machine."""
    return str(compute_dtype(dtype)).removeprefix("torch.")


def has_avx512() -> bool:
    """Whether this CPU has AVX-512."""
    require()
    import torch

    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def machine(dtype: Dtype = "auto") -> dict[str, str]:
    """Everything that the exact bits of results depend on: number format, hardware, libraries, threads."""
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


def prepare_dtype(dtype: Dtype) -> torch.dtype:
    """The number format that a setting means on this machine. This process can compute in it afterwards, emulating
    bfloat16 where the hardware lacks it."""
    compute_format = compute_dtype(dtype)
    if compute_format.itemsize == 2 and not multiplies_bfloat16():
        emulate_bfloat16()
    return compute_format
