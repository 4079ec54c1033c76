"""Memory of weights, KV cache, LoRA training and quantising: arithmetic on a model's shape.

benchmarks/memory.py compares it with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.ask.local.memory import MAX_SCORES
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
    """Buffers of the layer that is being processed, or gathered from other cards."""
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
    accumulates: bool = True,
) -> Parts:
    """Bytes of LoRA training on each card, or in host memory, at the moment of a step that takes most.

    Args:
        shape: of the base.
        rank: LoRA rank, on all linear layers.
        tokens: in a forward pass: sequences times their length.
        scored: completion tokens among them; only these have logits.
        bytes_each: bytes of a weight and of an activation: 2 in bfloat16, 4 in float32.
        checkpointing: whether the backward pass computes activations again, layer by layer.
        qlora: whether the base is in 4 bits.
        cards: number of cards that share weights and adapter (FSDP2, ZeRO-3); each gathers what it computes with; 0 is
            host memory.
        accumulates: whether a step has several forward passes, so that gradients of the first are there in the next.
    """
    base = float(shape.parameters * bytes_each)
    if qlora:
        base = shape.linear_parameters * NF4_BITS / 8 + shape.other_parameters * bytes_each
    shares, on_host, is_sharded = max(1, cards), cards == 0, cards > 1
    adapter = lora_parameters(shape, rank)
    # Autocast keeps a 16-bit copy of the float32 adapter until the forward pass ends, and autograd what it needs of it.
    copies = 2 * adapter if bytes_each < 4 and not is_sharded else 0
    layer = tokens * _activations_per_token(shape, rank, bytes_each)
    kept = shape.layers * (tokens * shape.hidden * bytes_each if checkpointing else layer)
    gathered_layers = 2 * shape.linear_parameters / shape.layers * bytes_each if is_sharded else 0
    gathered_head = shape.vocabulary * shape.hidden * bytes_each if is_sharded else 0
    logits = 4 * scored * shape.vocabulary  # in float32
    held = Parts(
        weights=base / shares,
        adapter=(16 if accumulates else 12) * adapter / shares,
        activations=kept,
        runtime=TRAINING_LIBRARIES_BYTES if on_host else RUNTIME_BYTES,
        fragmentation=FRAGMENTATION_BYTES * shape.parameters if on_host else 0,
    )
    moments = (
        # The end of the forward pass: logits and log-probabilities; the head's share is gathered into a buffer first.
        held._replace(adapter=held.adapter + copies, logits=2 * logits, layer=2 * gathered_head),
        # The beginning of the backward pass: also the gradient of the logits.
        held._replace(adapter=held.adapter + (0 if checkpointing else copies), logits=3 * logits, layer=gathered_head),
        # Its middle: a layer's activations are computed again; the next layer is gathered ahead.
        held._replace(activations=kept + (layer if checkpointing else 0), layer=gathered_layers),
        # The update.
        held._replace(adapter=16 * adapter / shares, activations=0),
    )
    return max(moments, key=lambda moment: moment.total)


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
    largest = max(shape.linears, key=lambda linear: linear.inputs * linear.outputs)
    inverse = 4 * (2 * max(linear.inputs for linear in shape.linears) ** 2 + 2 * largest.inputs * largest.outputs)
    return Parts(
        weights=shape.parameters * bytes_each,
        activations=2 * samples * tokens * shape.hidden * bytes_each,
        layer=_hessians(shape) + inverse,
    )


def quantising_layer(shape: Shape, tokens: int, *, bytes_each: int = 2) -> Parts:
    """Bytes on a card that holds one decoder layer while llm-compressor's GPTQ quantises it.

    Args:
        shape: of the merged model.
        tokens: in the longest calibration text.
        bytes_each: bytes of a weight: 2 in bfloat16, 4 in float32.
    """
    # A product of the inputs of the widest layer is added to its Hessian, from two copies of the inputs in float32.
    widest = max(linear.inputs for linear in shape.linears)
    calibrating = 4.0 * (widest**2 + 2 * tokens * widest)
    inputs = tokens * (2 * shape.hidden + 3 * shape.intermediate) * bytes_each
    return Parts(
        weights=shape.linear_parameters / shape.layers * bytes_each,
        layer=max(_hessians(shape) + calibrating + inputs, _quantising_linears(shape)),
    )


def _quantising_linears(shape: Shape) -> int:
    """Bytes of Hessians and buffers while the linear layers of a decoder layer are quantised one after another: of each
    its Hessian and two reordered copies beside its weights in float32, or two copies of the weights beside the Hessian
    (llm-compressor's own estimate, ``max_batch_size``), and the Hessians of those that follow."""
    peaks = []
    for place, linear in enumerate(shape.linears):
        hessian, weights = linear.inputs**2, linear.inputs * linear.outputs
        waiting = sum(other.inputs**2 for other in shape.linears[place + 1 :])
        peaks.append(4 * (waiting + max(3 * hessian + weights, hessian + 2 * weights)))
    return max(peaks)


def _hessians(shape: Shape) -> int:
    """Bytes of the Hessians of one layer's linear layers."""
    return 4 * sum(linear.inputs**2 for linear in shape.linears)


def answering(shape: Shape, rows: int, tokens: int, *, prompt: int = 0, bytes_each: int = 4) -> Parts:
    """Bytes of host memory of answering in this process.

    Args:
        shape: of the model; 4-bit weights are unpacked.
        rows: requests in a batch.
        tokens: in the longest prompt and answer together.
        prompt: tokens of the longest prompt that no other request shares; all are read at once.
        bytes_each: bytes of a weight, a key and a value: 2 in bfloat16, 4 in float32.
    """
    queries = shape.heads * shape.head_dim
    scores = min(MAX_SCORES, rows * shape.heads * prompt**2) * (2 * bytes_each + 4)  # as computed, masked, and float32
    attention = rows * prompt * 3 * queries * bytes_each + scores
    mlp = rows * prompt * 3 * shape.intermediate * bytes_each
    reading = rows * prompt * 2 * shape.hidden * bytes_each + max(attention, mlp)
    return Parts(
        weights=shape.parameters * bytes_each,
        activations=rows * tokens * kv_per_token(shape, bytes_each) + reading,
        logits=rows * shape.vocabulary * 4,
    )
