"""How much a card can answer in a given time, as arithmetic; ``fit_tables`` shows it.

A decoding step reads the weights and every sequence's keys and values once, so its time is their bytes divided by the
card's bandwidth; reading prompts is limited by matrix products. Servers reach a share of both. ``published`` holds the
forecasts against published figures.
"""

from __future__ import annotations

from typing import NamedTuple

from stepladder.ask.local.engine import BATCH_SIZE
from stepladder.forecast import memory
from stepladder.forecast.datasheets import CARDS, Card
from stepladder.forecast.memory import GIB, MAX_SEQUENCES
from stepladder.forecast.model_shape import Shape
from stepladder.forecast.workload import Workload, obstacle, slowdown

COMPUTE_EFFICIENCY = 0.5
"""Share of a card's matrix products that a server reaches. This share, the next and :data:`SEQUENCE_SECONDS` are fitted
to the published figures (``published``)."""
BANDWIDTH_EFFICIENCY = 0.6
"""Share of a card's bandwidth that a server reaches."""
MIN_STEP_SECONDS = 0.006
"""Of a decoding step, however small the model: launching kernels, sampling tokens."""
SEQUENCE_SECONDS = 6e-5
"""That a server spends on each sequence in a decoding step: scheduling, sampling, HTTP."""
EMBEDDED_LAYER_SECONDS = 0.0005
"""That the embedded engine spends on each layer in a decoding step on a card, launching its kernels (assumed)."""
START_SECONDS = 90.0
"""From the start of a server to its first answer, without loading weights: compiling, CUDA graphs."""
EMBEDDED_START_SECONDS = 10.0
"""The same for the embedded engine: importing libraries."""
LOAD_BYTES_PER_SECOND = 1e9
"""Of weights read from a disk."""
UNPACK_BYTES_PER_SECOND = 100e6
"""Of a package or an image that is unpacked and checked: a core of an AMD Zen 3 inflates 226 MB/s of random bytes
(gzip) and hashes 187 MB/s (SHA-256)."""


def arrival_seconds(size: float, megabits: float) -> float:
    """Seconds until bytes are downloaded at so many Mbit/s and unpacked; 0 at 0 Mbit/s, which means they are there."""
    return size / (megabits * 1e6 / 8) + size / UNPACK_BYTES_PER_SECOND if megabits else 0.0


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
    obstacle: str | None
    """Why the card cannot answer at all, whatever its memory."""

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
    reason = obstacle(card, workload)
    if reason is not None or cache < kv_per_token * workload.length:
        return Serving(weights, cache, 0, 0.0, float("inf"), reason)
    at_once = round(cache / (kv_per_token * workload.length))
    answers = workload.questions * workload.votes
    prompt_seconds = 0.0  # included in a measured rate
    if rate is None:
        rate = _decoding_rate(shape, workload, card)
        prompt_seconds = answers * workload.read * _seconds_per_token(shape, card)
    member_seconds = start_seconds(workload, weights) + prompt_seconds + answers * workload.answer / rate
    return Serving(weights, cache, at_once, rate, workload.members * member_seconds, None)


def start_seconds(workload: Workload, weights: float) -> float:
    """Seconds until so many bytes of weights are loaded and answer."""
    return (START_SECONDS if _serves(workload) else EMBEDDED_START_SECONDS) + weights / LOAD_BYTES_PER_SECOND


def throughput(shape: Shape, workload: Workload, card: Card) -> float:
    """Tokens of answers a second of a card at work: time for reading prompts is included, for starting it is not."""
    per_answer = workload.read * _seconds_per_token(shape, card)
    return workload.answer / (per_answer + workload.answer / _decoding_rate(shape, workload, card))


def _decoding_rate(shape: Shape, workload: Workload, card: Card) -> float:
    """Tokens written a second, without reading prompts."""
    weights, cache, kv_per_token = _memory(shape, workload, card)
    # Most sequences are shorter than the longest, and on average half of their answer is written.
    fitting = cache / (kv_per_token * (workload.prompt + workload.answer))
    most = MAX_SEQUENCES if _serves(workload) else BATCH_SIZE
    sequences = max(1.0, min(fitting, most, workload.questions * workload.votes))
    bytes_read = weights + sequences * kv_per_token * (workload.prompt + workload.answer / 2)
    read_seconds = bytes_read / (card.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY)
    step_seconds = max(MIN_STEP_SECONDS, read_seconds, sequences * _seconds_per_token(shape, card))
    if _serves(workload):
        step_seconds += sequences * SEQUENCE_SECONDS
    elif card.capability is not None:
        step_seconds = max(step_seconds, shape.layers * EMBEDDED_LAYER_SECONDS)
    return sequences / (step_seconds * slowdown(card, workload))


def _seconds_per_token(shape: Shape, card: Card) -> float:
    """Of matrix products."""
    return 2 * shape.parameters / (card.tflops * 1e12 * COMPUTE_EFFICIENCY)


def _serves(workload: Workload) -> bool:
    """Whether vLLM computes, not the embedded engine."""
    return workload.engine == "vllm"


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
    if (suggested := _other_card(workload, card)) is not None:
        changes.append((f"a card of {suggested.gib:g} GiB ({suggested.name})", workload, suggested))
    if workload.quantiser == "llmcompressor" and obstacle(card, workload) is not None:
        changes.append(("[quantise] backend = 'gptqmodel'", workload._replace(quantiser="gptqmodel"), card))
    results = [
        Lever(change, serving(shape, changed_workload, changed_card, rate if changed_card is card else None))
        for change, changed_workload, changed_card in changes
    ]
    return sorted(results, key=lambda lever: lever.result.seconds)


def _other_card(workload: Workload, card: Card) -> Card | None:
    """The smallest listed card with more memory, or where this one lacks the kernels with as much."""
    lacks_kernels = obstacle(card, workload) is not None
    for other in CARDS:
        is_larger = other.gib > card.gib or (lacks_kernels and other.gib == card.gib)
        if is_larger and obstacle(other, workload) is None:
            return other
    return None


def side_by_side_cache(shape: Shape, workload: Workload, card: Card) -> float | None:
    """Bytes of the KV cache of each member's server if all run on the card at once; None if they do not fit, or vLLM
    does not compute there."""
    if card.capability is None or not _serves(workload) or obstacle(card, workload) is not None:
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
    if not _serves(workload):
        bytes_each = 4 if workload.dtype == "float32" else card.bytes_each
        weights = float(shape.parameters * bytes_each)
        available = max(0.0, card.gib * GIB - weights - memory.RUNTIME_BYTES)
        return _Memory(weights, available, memory.kv_per_token(shape, bytes_each))
    weights = memory.weights(shape, workload.bits)
    is_cpu = card.capability is None
    available = memory.cache(card.gib * GIB * (1 if is_cpu else workload.utilisation), weights)
    cache_gib = workload.kv_cache_gib or (memory.HOST_CACHE_GIB if is_cpu else None)
    cache = available if cache_gib is None else min(available, cache_gib * GIB)
    return _Memory(weights, cache, memory.kv_per_token(shape))
