"""How much a card can answer in a given time, as arithmetic; ``fit_tables`` shows it.

A decoding step reads the weights and every sequence's keys and values once, so its time is their bytes divided by the
card's bandwidth; reading prompts is limited by matrix products. Servers reach a share of both (:data:`EFFICIENCY`).
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

EFFICIENCY = 0.5
"""Share of a card's bandwidth and of its matrix products that a server reaches."""
MIN_STEP_SECONDS = 0.006
"""Of a decoding step, however small the model: launching kernels, sampling tokens."""
START_SECONDS = 90.0
"""From the start of a server to its first answer, without loading weights: compiling, CUDA graphs."""
EMBEDDED_START_SECONDS = 10.0
"""The same for the embedded engine: importing libraries."""
LOAD_BYTES_PER_SECOND = 1e9
"""Of weights read from a disk."""


class Card(NamedTuple):
    """A card, by its data sheet."""

    name: str
    gib: float
    bandwidth: float
    """GB/s of its memory."""
    tflops: float
    """Dense 16-bit matrix products, 10^12 operations a second."""
    bytes_each: int | None = None
    """Bytes of a number, where the embedded engine computes with unpacked weights; None where vLLM computes."""


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
DEFAULT_CARD = next(card for card in CARDS if card.name == "V100 32")
"""Its speed is assumed for a card of which only the memory is known."""


def parse_card(text: str) -> Card:
    """The card with this name (``RTX 4090``, ``4090``, ``a100-80``), or with this memory in GiB, as fast as
    :data:`DEFAULT_CARD`; for ``cpu`` this machine's CPU.

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
    return DEFAULT_CARD._replace(name=f"{float(size[1]):g} GiB", gib=float(size[1]))


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
    return Card("this machine's CPU", (memory.free() or 0) / GIB, bandwidth, tflops, bytes_each)


def _fastest_seconds(call: Callable[[], object]) -> float:
    """The time of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


class Workload(NamedTuple):
    """The questions to answer, and the models that answer them."""

    questions: int
    votes: int
    """Answers to each question."""
    members: int
    prompt: float
    """Tokens of a prompt, on average."""
    read: float
    """Those of them that an earlier prompt about the same problem does not share, on average."""
    answer: float
    """Tokens of an answer, on average."""
    length: int
    """Tokens of the longest prompt and answer together."""
    bits: int
    """Of the members' weights."""
    utilisation: float = Serve().utilisation
    """Share of a card's memory that a server may use."""
    kv_cache_gib: float | None = None
    """Size of the KV cache; by default what the weights leave."""


class Serving(NamedTuple):
    """How a card handles a workload."""

    weights: float
    """Bytes."""
    cache: float
    """Bytes left for the KV cache."""
    at_once: int
    """Approximate number of sequences of maximum length that fit the cache; 0 if not even one does."""
    rate: float
    """Tokens written a second."""
    seconds: float
    """For all members, one after another; infinite if they do not fit."""

    @property
    def fits(self) -> bool:
        return self.at_once > 0


def serving(shape: Shape, workload: Workload, card: Card, rate: float | None = None) -> Serving:
    """How a card handles a workload, one member after another, each on the whole card.

    Args:
        shape: of every member.
        workload: the workload.
        card: the card.
        rate: tokens written a second as measured on the card, time for reading prompts included; by default estimated.
    """
    weights, cache, kv_per_token = _memory(shape, workload, card)
    start, max_sequences = (
        (START_SECONDS, MAX_SEQUENCES) if card.bytes_each is None else (EMBEDDED_START_SECONDS, BATCH_SIZE)
    )
    if cache < kv_per_token * workload.length:
        return Serving(weights, cache, 0, 0.0, float("inf"))
    at_once = round(cache / (kv_per_token * workload.length))
    answers = workload.questions * workload.votes
    # Most sequences are shorter than the longest, and on average half of their answer is written.
    fitting = cache / (kv_per_token * (workload.prompt + workload.answer))
    sequences = max(1.0, min(fitting, max_sequences, answers))
    bytes_read = weights + sequences * kv_per_token * (workload.prompt + workload.answer / 2)
    seconds_per_token = 2 * shape.parameters / (card.tflops * 1e12 * EFFICIENCY)  # of matrix products
    prompt_seconds = 0.0  # included in a measured rate
    if rate is None:
        read_seconds = bytes_read / (card.bandwidth * 1e9 * EFFICIENCY)
        rate = sequences / max(MIN_STEP_SECONDS, read_seconds, sequences * seconds_per_token)
        prompt_seconds = answers * workload.read * seconds_per_token
    member_seconds = start + weights / LOAD_BYTES_PER_SECOND + prompt_seconds + answers * workload.answer / rate
    return Serving(weights, cache, at_once, rate, workload.members * member_seconds)


class Lever(NamedTuple):
    """A change of plan, and its result."""

    change: str
    result: Serving


def levers(shape: Shape, workload: Workload, card: Card, rate: float | None = None) -> list[Lever]:
    """Single changes that make the workload smaller or the card larger, the one that takes the least time first."""
    changes = []
    if workload.members > 1:
        changes.append(("one member", workload._replace(members=1), card))
    if workload.votes > 1:
        changes.append(("one answer a question", workload._replace(votes=1), card))
    if workload.bits > 4:
        changes.append(("4 bits", workload._replace(bits=4), card))
    shorter = workload._replace(answer=workload.answer / 2, length=max(1, workload.length // 2))
    changes.append(("chains and length half as long", shorter, card))
    larger = [larger_card for larger_card in CARDS if larger_card.gib > card.gib]
    if larger:
        changes.append((f"a card of {larger[0].gib:g} GiB ({larger[0].name})", workload, larger[0]))
    results = [
        Lever(change, serving(shape, changed_workload, changed_card, rate if changed_card is card else None))
        for change, changed_workload, changed_card in changes
    ]
    return sorted(results, key=lambda lever: lever.result.seconds)


def members_in(shape: Shape, workload: Workload, card: Card, hours: float, rate: float | None = None) -> int:
    """How many members can answer all questions within the hours, one after another."""
    seconds = serving(shape, workload._replace(members=1), card, rate).seconds
    return int(hours * 3600 / seconds)


def side_by_side_cache(shape: Shape, workload: Workload, card: Card) -> float | None:
    """Bytes of the KV cache of each member's server if all run on the card at once; None if they do not fit, or vLLM
    does not compute there."""
    if card.bytes_each is not None:
        return None
    weights, _, kv_per_token = _memory(shape, workload, card)
    usable = card.gib * GIB * workload.utilisation
    return memory.side_by_side_cache(usable, [weights] * workload.members, kv_per_token * workload.length)


def longest_sequence(shape: Shape, workload: Workload, card: Card) -> int:
    """Tokens of the longest sequence whose keys and values fit beside the weights."""
    _, cache, kv_per_token = _memory(shape, workload, card)
    return int(cache / kv_per_token)


class _Memory(NamedTuple):
    """Bytes of the weights as loaded, of the KV cache, and of one token's keys and values."""

    weights: float
    cache: float
    kv_per_token: int


def _memory(shape: Shape, workload: Workload, card: Card) -> _Memory:
    if card.bytes_each is None:
        weights = memory.weights(shape, workload.bits)
        available = memory.cache(card.gib * GIB * workload.utilisation, weights)
        cache = available if workload.kv_cache_gib is None else min(available, workload.kv_cache_gib * GIB)
        return _Memory(weights, cache, memory.kv_per_token(shape))
    weights = float(shape.parameters * card.bytes_each)
    available = max(0.0, card.gib * GIB - weights - memory.RUNTIME_BYTES)
    return _Memory(weights, available, memory.kv_per_token(shape, card.bytes_each))
