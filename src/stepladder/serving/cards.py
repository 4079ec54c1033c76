"""The cards of this machine: which may be used, which server gets which, and whether servers fit beside each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.config import Serve
from stepladder.errors import ModelError, ServeError
from stepladder.forecast import memory, model_shape


def cards_by_server(settings: Serve) -> list[tuple[str, ...]]:
    """Cards by server; one server without a card where there is none.

    Raises:
        ServeError: fewer cards than one server is to be spread over.
    """
    found, each = visible_cards(), settings.tensor_parallel
    if not found:
        if each > 1:
            raise ServeError(f"[serve] tensor_parallel = {each}, but this machine has no card; leave it out")
        return [()]
    if each > len(found):
        raise ServeError(f"[serve] tensor_parallel = {each}, but there are {len(found)} cards; lower it")
    return [tuple(found[start : start + each]) for start in range(0, len(found) - each + 1, each)]


def visible_cards() -> list[str]:
    """Cards that may be used, by what CUDA calls them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [card.strip() for card in visible.split(",") if card.strip() not in {"", "-1"}]
    return [str(index) for index in range(len(_read_memory()))]


def side_by_side(folders: Sequence[Path], settings: Serve) -> Serve | None:
    """Settings under which servers of all these models fit beside each other on every card, each with room for a batch
    worth having; None where they do not fit, nothing tells, or there is no card: on the same cores they would only wait
    for each other."""
    if cards_by_server(settings) == [()]:
        return None
    loaded = [memory.weights_on_disk(folder) for folder in folders]
    try:
        each = max(memory.kv_per_token(model_shape.read(folder)) for folder in folders) / settings.tensor_parallel
    except ModelError:  # of a kind that nothing is known of
        return None
    reported = _read_memory()
    memories = [memory_of_card for memory_of_card in reported if memory_of_card is not None]
    if not memories or len(memories) < len(reported):
        return None
    # The smallest card decides; all of one machine are mostly alike.
    usable = min(min(card.free, card.total * settings.utilisation) for card in memories)
    spread = [size / settings.tensor_parallel for size in loaded]
    cache, wanted = memory.shared(usable, spread, settings.max_length * each), settings.kv_cache_gib
    if cache is None or (wanted is not None and wanted * 2**30 > cache):
        return None
    share = {"kv_cache_gib": wanted or cache / 2**30, "utilisation": settings.utilisation / len(folders)}
    return settings.model_copy(update=share)


class CardMemory(NamedTuple):
    """Memory of a card, bytes."""

    total: int
    free: int


def _read_memory() -> list[CardMemory | None]:
    """Memory of every card, by its index; None where the driver does not report it. Empty without a card, without a
    driver, and where the driver does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    memories: list[CardMemory | None] = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            try:
                info = pynvml.nvmlDeviceGetMemoryInfo(card)
            except pynvml.NVMLError_NotSupported:
                memories.append(None)
            else:
                memories.append(CardMemory(info.total, info.free))
    except pynvml.NVMLError:
        return []
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return memories
