"""Cards by their data sheets, and this machine's CPU by a short measurement."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stepladder import models
from stepladder.errors import MissingExtra, UserError
from stepladder.forecast.memory import GIB
from stepladder.models.free_memory import free_on_host


class Card(NamedTuple):
    """A card, or a CPU."""

    name: str
    gib: float
    bandwidth: float
    """GB/s of its memory."""
    tflops: float
    """Dense 16-bit matrix products with sums in 32 bits, 10^12 operations a second."""
    capability: tuple[int, int] | None
    """NVIDIA's compute capability, which decides what kernels there are; None for a CPU."""
    source: str
    """Where the figures are from."""
    taken_for: str | None = None
    """The listed card that stands for it where only its memory is known; None where the card itself is known."""
    bytes_each: int = 2
    """Bytes of a number in the embedded engine."""


CARDS = (
    Card("T4", 16, 320, 65, (7, 5), "T4 datasheet, NVIDIA 2019"),
    Card("L4", 24, 300, 121, (8, 9), "L4 datasheet, NVIDIA 2023"),
    Card("A10", 24, 600, 125, (8, 6), "A10 datasheet, NVIDIA 2021"),
    Card("A10G", 24, 600, 70, (8, 6), "A10G datasheet, NVIDIA and AWS 2021"),
    Card("RTX 3090", 24, 936, 71, (8, 6), "Ampere GA102 whitepaper, NVIDIA 2020"),
    Card("RTX 4090", 24, 1008, 165, (8, 9), "Ada whitepaper, NVIDIA 2022"),
    Card("V100 32", 32, 900, 125, (7, 0), "V100 datasheet, NVIDIA 2020"),
    Card("RTX 5090", 32, 1792, 209, (12, 0), "RTX Blackwell whitepaper, NVIDIA 2025"),
    Card("A100 40", 40, 1555, 312, (8, 0), "A100 datasheet, NVIDIA 2021"),
    Card("L40S", 48, 864, 362, (8, 9), "L40S datasheet, NVIDIA 2023"),
    Card("A100 80", 80, 2039, 312, (8, 0), "A100 datasheet, NVIDIA 2021"),
    Card("H100", 80, 3350, 989, (9, 0), "H100 SXM datasheet, NVIDIA 2023"),
    Card("H200", 141, 4800, 989, (9, 0), "H200 datasheet, NVIDIA 2024"),
)
"""Smallest first. Compute capabilities: developer.nvidia.com/cuda-gpus."""


def parse_card(text: str) -> Card:
    """The card with this name (``RTX 4090``, ``4090``, ``a100-80``). For a memory in GiB the slowest listed card that
    is as large stands, with that memory. For ``cpu`` this machine's CPU.

    Raises:
        UserError: it is none of these.
    """
    normalised = re.sub(r"[^a-z0-9]", "", text.lower())
    if normalised == "cpu":
        return this_machine()
    for card in CARDS:
        names = (card.name, card.name.removeprefix("RTX "))
        if normalised in {re.sub(r"[^a-z0-9]", "", name.lower()) for name in names}:
            return card
    size = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*(?:gi?b)?", text.strip().lower())
    if size is None or not float(size[1]):
        listed = ", ".join(card.name for card in CARDS)
        raise UserError(f"--card {text!r}: no such card; give its GiB, such as 32, or cpu, or one of {listed}")
    gib = float(size[1])
    as_large = min((card.gib for card in CARDS if card.gib >= gib), default=CARDS[-1].gib)
    slowest = min((card for card in CARDS if card.gib == as_large), key=lambda card: (card.bandwidth, card.tflops))
    return slowest._replace(name=f"{gib:g} GiB", gib=gib, taken_for=slowest.name)


def this_machine() -> Card:
    """This machine's CPU and free memory, with the speed of a short measurement in float32."""
    try:
        bytes_each = models.compute_dtype().itemsize
    except MissingExtra:
        bytes_each = 4
    square = np.ones((1536, 1536), dtype=np.float32)
    vector = np.ones(2**26, dtype=np.float32)
    tflops = 2 * len(square) ** 3 / _fastest_seconds(lambda: square @ square) / 1e12
    bandwidth = vector.nbytes / _fastest_seconds(vector.sum) / 1e9
    gib = (free_on_host() or 0) / GIB
    return Card("this machine's CPU", gib, bandwidth, tflops, None, "a short measurement", bytes_each=bytes_each)


def _fastest_seconds(call: Callable[[], object]) -> float:
    """The time of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
