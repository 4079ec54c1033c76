"""Memory of weights, KV cache, LoRA training and quantising: arithmetic on a model's shape.

benchmarks/memory.py compares it with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.forecast.model_shape import Shape

GIB = 2**30
RUNTIME_BYTES = 1.1 * GIB
"""Memory of a process before any weights: a CUDA context and PyTorch's kernels on a card, or the libraries for
quantising and answering in host memory."""
TRAINING_LIBRARIES_BYTES = 0.6 * GIB
"""Host memory of the libraries that training loads."""
FRAGMENTATION_BYTES = 4
"""For each parameter of the base, host memory that training holds but does not use: gaps in the heap of the C library
(glibc) between activations of many sizes. Measured: with every large tensor in a mapping of its own they vanish, and a
step takes a third longer (docs/experiments.md)."""
SERVER_BYTES = 1.5 * GIB
"""Memory of vLLM beside weights and KV cache: its context, activations of a prompt and CUDA graphs."""
HOST_CACHE_GIB = 2.0
"""KV cache of a server in host memory, by default."""
MAX_SEQUENCES = 256
"""Sequences that a server decodes at once, as many as are requested at once; vLLM's default may be half of that."""
MIN_SIDE_BY_SIDE_SEQUENCES = 16
"""Sequences of maximum length that must fit the KV cache of each server where several share a card: with fewer, one
server after another on the whole card is faster."""
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in QLoRA's base: 4, and an 8-bit scale for each 64, itself scaled in blocks of 256 (Dettmers et al. 2023,
arXiv:2305.14314)."""


class Parts(NamedTuple):
    """Bytes by purpose."""

    weights: float
    adapter: float = 0
    """LoRA weights, their gradients and AdamW's two moments."""
    activations: float = 0
    """Kept for the backward pass, or by calibration."""
    logits: float = 0
    layer: float = 0
    """Buffers of the layer that is being processed."""
    runtime: float = RUNTIME_BYTES
    fragmentation: float = 0
    """Held by the heap but not used."""

    @property
    def total(self) -> float:
        return sum(self)


def weights(shape: Shape, bits: int = 16, group: int = 128) -> float:
    """Bytes of the weights on disk and on a card: linear layers in 4, 8, 16 or 32 bits, with a 16-bit scale and a zero
    point for each group (which classic GPTQ stores even for symmetric quantising); the rest in 16 bits (32 if ``bits``
    is 32)."""
    if bits >= 16:
        return shape.parameters * bits / 8
    bits_each = bits + (16 + bits) / group
    return shape.linear_parameters * bits_each / 8 + shape.other_parameters * 2


def weights_on_disk(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def kv_per_token(shape: Shape, bytes_each: int = 2) -> int:
    """Bytes of a token's keys and values."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_each


def cache(usable: float, loaded: float) -> float:
    """Bytes of vLLM's KV cache if it may use ``usable`` bytes of a card and weights take ``loaded``; at least 0."""
    return max(0.0, usable - loaded - SERVER_BYTES)


def side_by_side_cache(usable: float, loaded: Sequence[float], longest: float) -> float | None:
    """Bytes of the KV cache of each of several servers on one card; None if that is less than
    :data:`MIN_SIDE_BY_SIDE_SEQUENCES` need.

    Args:
        usable: bytes of the card that the servers may use.
        loaded: bytes of each server's weights.
        longest: bytes of the keys and values of a sequence of maximum length.
    """
    each = cache(usable / len(loaded), sum(loaded) / len(loaded))
    return each if each >= MIN_SIDE_BY_SIDE_SEQUENCES * longest else None


def lora_parameters(shape: Shape, rank: int) -> int:
    """Parameters of an adapter on all linear layers."""
    return shape.layers * sum(rank * (linear.inputs + linear.outputs) for linear in shape.linears)


def training(
    shape: Shape,
    rank: int,
    tokens: int,
    scored: int,
    *,
    bytes_each: int = 2,
    checkpointing: bool = True,
    qlora: bool = False,
    cards: int = 1,
) -> Parts:
    """Bytes of LoRA training on each card, or in host memory.

    Args:
        shape: of the base.
        rank: LoRA rank, on all linear layers.
        tokens: in a forward pass: sequences times their length.
        scored: completion tokens among them; only these have logits.
        bytes_each: bytes of a weight and of an activation: 2 in bfloat16, 4 in float32.
        checkpointing: whether the backward pass computes activations again, layer by layer.
        qlora: whether the base is in 4 bits.
        cards: number of cards that share weights and adapter (FSDP2, ZeRO-3); with more than one, each also holds two
            whole layers at a time; 0 is host memory.
    """
    base = float(shape.parameters * bytes_each)
    if qlora:
        base = shape.linear_parameters * NF4_BITS / 8 + shape.other_parameters * bytes_each
    layer_activations = tokens * _activations_per_token(shape, rank, bytes_each)
    layer_inputs = tokens * shape.hidden * bytes_each
    gathered = 2 * shape.linear_parameters / shape.layers * bytes_each if cards > 1 else 0
    shares, on_host = max(1, cards), cards == 0
    return Parts(
        weights=base / shares,
        adapter=16 * lora_parameters(shape, rank) / shares,
        activations=layer_activations + shape.layers * layer_inputs
        if checkpointing
        else shape.layers * layer_activations,
        # The logits in the model's number format; and in float32 the logits, log-probabilities and the gradient.
        logits=scored * shape.vocabulary * (12 + (bytes_each if bytes_each < 4 else 0)),
        layer=gathered,
        runtime=TRAINING_LIBRARIES_BYTES if on_host else RUNTIME_BYTES,
        fragmentation=FRAGMENTATION_BYTES * shape.parameters if on_host else 0,
    )


def _activations_per_token(shape: Shape, rank: int, bytes_each: int) -> float:
    """Bytes that a layer keeps of each token for its backward pass."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Of each norm: float32 values, its input and its output.
    norms = 2 * (shape.hidden * 4 + 2 * shape.hidden * bytes_each)
    # Queries and keys after the rotary embedding, keys and values repeated for every head, and the output.
    attention = (3 * queries + 2 * keys + 2 * queries) * bytes_each
    mlp = 4 * shape.intermediate * bytes_each  # gate, its activation, up, their product
    lora = len(shape.linears) * rank * 4
    # The inputs of the float32 adapter.
    copies = 0.0 if bytes_each == 4 else 4.0 * (2 * shape.hidden + queries + shape.intermediate)
    return norms + attention + mlp + lora + copies


def quantising(shape: Shape, samples: int, tokens: int, *, bytes_each: int = 2) -> Parts:
    """Bytes of host memory of GPTQ, which processes one layer at a time.

    Args:
        shape: of the merged model.
        samples: number of calibration texts.
        tokens: in a text, on average.
        bytes_each: bytes of a weight: 2 in bfloat16, 4 in float32.
    """
    hessians = 4 * sum(linear.inputs**2 for linear in shape.linears)
    largest = max(shape.linears, key=lambda linear: linear.inputs * linear.outputs)
    inverse = 4 * (2 * max(linear.inputs for linear in shape.linears) ** 2 + 2 * largest.inputs * largest.outputs)
    return Parts(
        weights=shape.parameters * bytes_each,
        activations=2 * samples * tokens * shape.hidden * bytes_each,
        layer=hessians + inverse,
    )


def answering(shape: Shape, rows: int, tokens: int, *, bytes_each: int = 4) -> Parts:
    """Bytes of host memory of answering in this process.

    Args:
        shape: of the model; 4-bit weights are unpacked.
        rows: requests in a batch.
        tokens: in the longest prompt and answer together.
        bytes_each: bytes of a weight, a key and a value: 2 in bfloat16, 4 in float32.
    """
    return Parts(
        weights=shape.parameters * bytes_each,
        activations=rows * tokens * kv_per_token(shape, bytes_each),
        logits=rows * shape.vocabulary * 4,
    )
