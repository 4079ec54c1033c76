"""The cards of this machine: which may be used, which server gets which, and whether servers fit beside each other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

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
    return [index for (index,) in _listed("index")]


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
    sizes = _listed("memory.total,memory.free")
    if not sizes or not all(size.isdigit() for row in sizes for size in row):  # a card may say that it does not know
        return None
    # The smallest card decides; all of one machine are mostly alike.
    usable = min(min(int(free), int(total) * settings.utilisation) for total, free in sizes) * 2**20
    spread = [size / settings.tensor_parallel for size in loaded]
    cache, wanted = memory.shared(usable, spread, settings.max_length * each), settings.kv_cache_gib
    if cache is None or (wanted is not None and wanted * 2**30 > cache):
        return None
    share = {"kv_cache_gib": wanted or cache / 2**30, "utilisation": settings.utilisation / len(folders)}
    return settings.model_copy(update=share)


def _listed(what: str) -> list[list[str]]:
    """What nvidia-smi says of each card; nothing where there is none."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    words = [tool, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    return [line.split(", ") for line in said.stdout.splitlines()] if said.returncode == 0 else []
