"""The cards of this machine: which may be used, which server uses which, and whether servers fit side by side."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.config import Serve
from stepladder.errors import ModelError, ServeError
from stepladder.forecast import memory, model_shape

TAKEN_SHARE = 0.1
"""Of a card's memory that others hold, from which on it is said; a desktop and this process' own share are below it."""


def cards_by_server(settings: Serve) -> list[tuple[str, ...]]:
    """The cards of each server; on a machine without a card one server, which has none.

    Raises:
        ServeError: there are fewer cards than one server needs.
    """
    cards, per_server = visible_cards(), settings.tensor_parallel
    if not cards:
        if per_server > 1:
            raise ServeError(f"[serve] tensor_parallel = {per_server}, but this machine has no card; leave it out")
        return [()]
    if per_server > len(cards):
        raise ServeError(f"[serve] tensor_parallel = {per_server}, but there are {len(cards)} cards; lower it")
    return [tuple(cards[start : start + per_server]) for start in range(0, len(cards) - per_server + 1, per_server)]


def visible_cards() -> list[str]:
    """Cards that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [card.strip() for card in visible.split(",") if card.strip() not in {"", "-1"}]
    return [str(index) for index in range(len(_read_memory()))]


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
    memories = [card for card in reported if card is not None]
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


def taken() -> list[str]:
    """A line for each visible card of which other programs hold much memory, such as a server of one's own that is no
    longer asked. (Not run on a card.)"""
    visible = visible_cards()
    return [
        f"card {index}: {(card.total - card.free) / 2**30:.1f} of {card.total / 2**30:.1f} GiB are taken by other "
        "programs; if they are servers of yours that this run no longer asks, end them"
        for index, card in enumerate(_read_memory())
        if card is not None and str(index) in visible and card.total - card.free > TAKEN_SHARE * card.total
    ]


class CardMemory(NamedTuple):
    """Memory of a card, bytes."""

    total: int
    free: int


def _read_memory() -> list[CardMemory | None]:
    """Memory of every card, by its index; None for a card whose memory the driver does not report. Empty without a
    card, without a driver, or if the driver does not answer."""
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
