"""What a card can serve, train and quantise in the hours there are, as arithmetic; ``fit_tables`` shows it.

A decoding step reads the weights and every sequence's keys and values once, so its time is their bytes by the card's
bandwidth; reading prompts is matrix products. Real servers reach a share of both limits (:data:`REACHED`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stepladder import models
from stepladder.ask.local.engine import BATCH_SIZE
from stepladder.config import Serve
from stepladder.errors import MissingExtra, UserError
from stepladder.forecast import memory
from stepladder.forecast.memory import GIB, MAX_SEQUENCES
from stepladder.forecast.model_shape import Shape

REACHED = 0.5
"""Share of a card's bandwidth and matrix products that a server reaches."""
STEP = 0.006
"""Seconds of a decoding step at least, however small the model: kernels to start, tokens to draw."""
START = 90.0
"""Seconds from the start of a server to its first answer, loading apart: compiling, CUDA graphs."""
EMBEDDED_START = 10.0
"""The same of the embedded engine: libraries to import."""
LOADED = 1e9
"""Bytes of weights a second that are read from a disk."""


class Card(NamedTuple):
    """A card by its data sheet."""

    name: str
    gib: float
    bandwidth: float
    """GB/s of its memory."""
    tflops: float
    """Dense 16-bit matrix products, 10^12 operations a second."""
    bytes_each: int | None = None
    """Of a number, where the embedded engine computes with unpacked weights; None where vLLM computes on a card."""


CARDS = (
    Card("T4", 16, 320, 65),
    Card("L4", 24, 300, 121),
    Card("A10", 24, 600, 125),
    Card("RTX 3090", 24, 936, 71),
    Card("RTX 4090", 24, 1008, 165),
    Card("V100 32", 32, 900, 125),
    Card("RTX 5090", 32, 1792, 209),
    Card("A100 40", 40, 1555, 312),
    Card("L40S", 48, 864, 362),
    Card("A100 80", 80, 2039, 312),
    Card("H100", 80, 3350, 989),
    Card("H200", 141, 4800, 989),
)
"""From the makers' data sheets, smallest first."""
USUAL = next(card for card in CARDS if card.name == "V100 32")
"""What a card of which only the size is known is taken to be as fast as."""


def card(text: str) -> Card:
    """The card of a name (``RTX 4090``, ``4090``, ``a100-80``), or of a size in GiB, as fast as :data:`USUAL`; ``cpu``
    is this machine without one.

    Raises:
        UserError: neither.
    """
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    if plain == "cpu":
        return this_machine()
    for known in CARDS:
        if plain in {re.sub(r"[^a-z0-9]", "", part.lower()) for part in (known.name, known.name.removeprefix("RTX "))}:
            return known
    size = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*(?:gi?b)?", text.strip().lower())
    if size is None or not float(size[1]):
        names = ", ".join(known.name for known in CARDS)
        raise UserError(f"--card {text!r}: no such card; give its GiB, such as 32, or cpu, or one of {names}")
    return USUAL._replace(name=f"{float(size[1]):g} GiB", gib=float(size[1]))


def this_machine() -> Card:
    """The CPU and the memory that this process has, as fast as a moment's measuring finds them (in float32)."""
    try:
        each = models.compute_dtype().itemsize
    except MissingExtra:
        each = 4
    square = np.ones((1536, 1536), dtype=np.float32)
    long = np.ones(2**26, dtype=np.float32)
    products = _fastest(lambda: square @ square)
    read = _fastest(long.sum)
    gib = (memory.free() or 0) / GIB
    return Card("this machine's CPU", gib, long.nbytes / read / 1e9, 2 * len(square) ** 3 / products / 1e12, each)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some times."""
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


class Workload(NamedTuple):
    """What is to be answered."""

    questions: int
    votes: int
    """Answers to a question."""
    members: int
    prompt: float
    """Tokens of a prompt on average."""
    read: float
    """Tokens of a prompt on average that no earlier question about the same problem had."""
    answer: float
    """Tokens of an answer on average."""
    length: int
    """Tokens of the longest prompt and answer together."""
    bits: int
    """Of the members' weights."""
    utilisation: float = Serve().utilisation
    """Share of a card that a server may use."""
    kv_cache_gib: float | None = None
    """GiB of keys and values, where they are not what is left."""


class Serving(NamedTuple):
    """What work comes to on a card."""

    weights: float
    """Bytes."""
    cache: float
    """Bytes left for keys and values."""
    at_once: int
    """Sequences of full length that fit, about; 0: not even one does."""
    rate: float
    """Tokens written a second."""
    seconds: float
    """Of all members, one after another; infinite where they do not fit."""

    @property
    def fits(self) -> bool:
        return self.at_once > 0


def serving(shape: Shape, work: Workload, on: Card, rate: float | None = None) -> Serving:
    """What answering takes, one member after another, each on all of the card.

    Args:
        shape: of every member.
        work: what is to be answered.
        on: the card.
        rate: tokens written a second as measured on it, prompts being read meanwhile, if somebody did.
    """
    loaded, cache, each = _room(shape, work, on)
    start, most = (START, MAX_SEQUENCES) if on.bytes_each is None else (EMBEDDED_START, BATCH_SIZE)
    if cache < each * work.length:
        return Serving(loaded, cache, 0, 0.0, float("inf"))
    at_once = round(cache / (each * work.length))
    answers = work.questions * work.votes
    # Sequences are half written on average, and shorter than the longest.
    side_by_side = max(1.0, min(cache / (each * (work.prompt + work.answer)), most, answers))
    moved = loaded + side_by_side * each * (work.prompt + work.answer / 2)
    products = 2 * shape.parameters / (on.tflops * 1e12 * REACHED)  # seconds a token
    reading = 0.0  # is part of a rate that was measured
    if rate is None:
        rate = side_by_side / max(STEP, moved / (on.bandwidth * 1e9 * REACHED), side_by_side * products)
        reading = answers * work.read * products
    member = start + loaded / LOADED + reading + answers * work.answer / rate
    return Serving(loaded, cache, at_once, rate, work.members * member)


class Lever(NamedTuple):
    """A change of plan, and what it would come to."""

    change: str
    done: Serving


def levers(shape: Shape, work: Workload, on: Card, rate: float | None = None) -> list[Lever]:
    """Changes of one thing that make the work smaller or the card larger, the one that helps most first."""
    found = []
    if work.members > 1:
        found.append(("one member", work._replace(members=1), on))
    if work.votes > 1:
        found.append(("one answer a question", work._replace(votes=1), on))
    if work.bits > 4:
        found.append(("4 bits", work._replace(bits=4), on))
    short = work._replace(answer=work.answer / 2, length=max(1, work.length // 2))
    found.append(("chains and length half as long", short, on))
    larger = [larger_card for larger_card in CARDS if larger_card.gib > on.gib]
    if larger:
        found.append((f"a card of {larger[0].gib:g} GiB ({larger[0].name})", work, larger[0]))
    done = [
        Lever(change, serving(shape, less, target, rate if target is on else None)) for change, less, target in found
    ]
    return sorted(done, key=lambda lever: lever.done.seconds)


def members_in(shape: Shape, work: Workload, on: Card, hours: float, rate: float | None = None) -> int:
    """How many members answer it all within the hours, one after another."""
    seconds = serving(shape, work._replace(members=1), on, rate).seconds
    return int(hours * 3600 / seconds)


def side_by_side(shape: Shape, work: Workload, on: Card) -> float | None:
    """Bytes of keys and values that each member's server has where all stand on the card at once; None where they do
    not fit, or vLLM does not compute there."""
    if on.bytes_each is not None:
        return None
    loaded, _, each = _room(shape, work, on)
    return memory.side_by_side_cache(on.gib * GIB * work.utilisation, [loaded] * work.members, each * work.length)


def longest(shape: Shape, work: Workload, on: Card) -> int:
    """Tokens of the longest sequence that fits beside the weights, alone."""
    _, cache, each = _room(shape, work, on)
    return int(cache / each)


class _Room(NamedTuple):
    """Bytes of the weights as they are computed with, what is left for keys and values, and a token's."""

    loaded: float
    cache: float
    each: int


def _room(shape: Shape, work: Workload, on: Card) -> _Room:
    if on.bytes_each is None:
        loaded = memory.weights(shape, work.bits)
        left = memory.cache(on.gib * GIB * work.utilisation, loaded)
        cache = left if work.kv_cache_gib is None else min(left, work.kv_cache_gib * GIB)
        return _Room(loaded, cache, memory.kv_per_token(shape))
    loaded = float(shape.parameters * on.bytes_each)
    left = max(0.0, on.gib * GIB - loaded - memory.RUNTIME)
    return _Room(loaded, left, memory.kv_per_token(shape, on.bytes_each))
