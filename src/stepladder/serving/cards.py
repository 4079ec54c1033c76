"""The cards of this machine: which may be used, which server uses which, and whether servers fit side by side."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from stepladder.config import Serve
from stepladder.errors import ModelError, ServeError
from stepladder.forecast import memory, model_shape

TAKEN_SHARE = 0.1
"""Of a card's memory that others hold, from which on it is said; a desktop is below it."""
AMD_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where AMD's driver (amdkfd) lists processors and cards (docs.kernel.org, GPU topology in sysfs)."""


def cards_by_server(settings: Serve) -> list[tuple[str, ...]]:
    """The cards of each server, without those of which other programs hold too much; on a machine without a card one
    server, which has none.

    Raises:
        ServeError: there are fewer cards than one server needs, or fewer that are free.
    """
    cards, per_server = visible_cards(), settings.tensor_parallel
    if not cards:
        if per_server > 1:
            raise ServeError(f"[serve] tensor_parallel = {per_server}, but this machine has no card; leave it out")
        return [()]
    if per_server > len(cards):
        raise ServeError(f"[serve] tensor_parallel = {per_server}, but there are {len(cards)} cards; lower it")
    memory_of = _read_memory()
    free = [card for card in cards if _has_room(memory_of.get(card), settings)]
    if len(free) < per_server:
        raise ServeError(
            f"[serve] utilisation = {settings.utilisation:g}: a server needs so much of {per_server} of the "
            f"{len(cards)} cards, and {len(free)} have it free; lower it, or end what holds them: "
            f"{'; '.join(taken(1 - settings.utilisation)) or 'this process does'}"
        )
    return [tuple(free[start : start + per_server]) for start in range(0, len(free) - per_server + 1, per_server)]


def _has_room(card: CardMemory | None, settings: Serve) -> bool:
    """Whether vLLM would start on a card, which it does where its share is free. One whose memory is not reported is
    tried."""
    return card is None or card.free >= settings.utilisation * card.total


def visible_cards() -> list[str]:
    """Cards that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))  # the second is ROCm's
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip() not in {"", "-1"}]
    return [*_read_memory()] or [str(index) for index in range(_amd_cards())]


def side_by_side_settings(folders: Sequence[Path], settings: Serve) -> Serve | None:
    """Settings under which servers of all these models fit on every card at once, each with a KV cache of useful size.

    None if they do not fit, if memory or a model's shape is not known, or without a card: on the same cores, servers
    would only slow each other down.
    """
    if cards_by_server(settings) == [()]:
        return None
    try:
        kv_per_token = max(memory.kv_per_token(model_shape.read(folder)) for folder in folders)
    except ModelError:
        return None
    reported = _read_memory()
    memories = [card for card in reported.values() if card is not None]
    if not memories or len(memories) < len(reported):
        return None
    # The smallest card decides; those of one machine are mostly alike.
    usable = min(min(card.free, card.total * settings.utilisation) for card in memories)
    weights = [memory.weights_on_disk(folder) / settings.tensor_parallel for folder in folders]
    longest = settings.max_length * kv_per_token / settings.tensor_parallel
    cache = memory.side_by_side_cache(usable, weights, longest)
    if cache is None or (settings.kv_cache_gib is not None and settings.kv_cache_gib * 2**30 > cache):
        return None
    shares = {
        "kv_cache_gib": settings.kv_cache_gib or cache / 2**30,
        "utilisation": settings.utilisation / len(folders),
    }
    return settings.model_copy(update=shares)


def taken(share: float = TAKEN_SHARE) -> list[str]:
    """A line for each visible card of which programs that this process did not start hold more than a share of the
    memory, such as a server of one's own that is no longer asked. (Not run on a card.)"""
    memory_of = _read_memory()
    cards = [(name, card) for name in visible_cards() if (card := memory_of.get(name)) is not None]
    return [
        f"card {name}: {card.held / 2**30:.1f} of {card.total / 2**30:.1f} GiB are held by "
        f"{', '.join(card.holders) or 'other programs'}"
        for name, card in cards
        if card.held > share * card.total
    ]


def free_bytes() -> list[int | None]:
    """Free memory of each visible card, in the order in which they are used; None for one that does not report it."""
    memory_of = _read_memory()
    cards = [memory_of.get(name) for name in visible_cards()]
    return [None if card is None else card.free for card in cards]


class CardMemory(NamedTuple):
    """Memory of a card, bytes."""

    total: int
    free: int
    own: int = 0
    """Of what is not free, that of this process and of those that it started."""
    holders: tuple[str, ...] = ()
    """The other programs on it, as far as the driver names them."""

    @property
    def held(self) -> int:
        """What other programs hold."""
        return max(0, self.total - self.free - self.own)


def _read_memory() -> dict[str, CardMemory | None]:
    """Memory of every NVIDIA card, by its number as the driver counts; None for a card whose memory it does not report.
    Empty without a card, without a driver, or if the driver does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    memories: dict[str, CardMemory | None] = {}
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            try:
                info = pynvml.nvmlDeviceGetMemoryInfo(card)
            except pynvml.NVMLError_NotSupported:
                memories[str(index)] = None
            else:
                memories[str(index)] = CardMemory(info.total, info.free, *_programs(card))
    except pynvml.NVMLError:
        return {}
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return memories


def _programs(card: Any) -> tuple[int, tuple[str, ...]]:
    """Bytes of a card that this process and those it started hold, and who else is there. Nobody where the driver does
    not say, as in many containers."""
    import pynvml

    try:
        programs = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    except pynvml.NVMLError:
        return 0, ()
    here = psutil.Process()
    own = {here.pid, *(process.pid for process in here.children(recursive=True))}
    return (
        sum(program.usedGpuMemory or 0 for program in programs if program.pid in own),
        tuple(f"process {program.pid}{_name_of(program.pid)}" for program in programs if program.pid not in own),
    )


def _name_of(pid: int) -> str:
    """The name of a process in parentheses; nothing where it cannot be seen."""
    try:
        return f" ({psutil.Process(pid).name()})"
    except psutil.Error:
        return ""


def _amd_cards() -> int:
    """Number of cards that AMD's driver lists: the nodes of its topology that have compute units. (Not run on a
    card.)"""
    count = 0
    for path in AMD_TOPOLOGY.glob("*/properties"):
        with contextlib.suppress(OSError):  # a card that this container may not use
            count += re.search(r"^simd_count [1-9]", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    return count
