"""Memory that is free on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from stepladder.models.number_format import has_cuda


def free_on_host() -> int | None:
    """Bytes of host memory that this process can still allocate, within the limit of its control group (cgroup v2);
    None if that cannot be read."""
    available_kib = re.search(r"MemAvailable:\s+(\d+) kB", _read_text(Path("/proc/meminfo")))
    if available_kib is None:
        return None
    available = int(available_kib[1]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    limit, used = _read_text(cgroup / "memory.max").strip(), _read_text(cgroup / "memory.current").strip()
    return min(available, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else available


def free_where_computed() -> int | None:
    """Bytes that tensors can still take where models compute: on the current card, what PyTorch keeps for tensors that
    are gone included (not run on a card); without a card as :func:`free_on_host`."""
    if not has_cuda():
        return free_on_host()
    import torch

    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
