"""How many bytes weights, KV cache, LoRA training and quantising take: arithmetic on a model's shape, nothing measured.

benchmarks/memory.py holds it against what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.forecast.model_shape import Shape

GIB = 2**30
RUNTIME = 1.1 * GIB
"""What a process takes before any weights: a CUDA context and PyTorch's kernels on a card, or what quantising and
answering load in host memory."""
LIBRARIES = 0.6 * GIB
"""What training's libraries take in host memory."""
FRAGMENTATION = 4
"""Bytes a parameter of the base that training in host memory keeps beside what it uses: gaps in the heap of the C
library (glibc), between activations that come and go in many sizes. Measured: with every large tensor mapped on its own
they vanish, and a step takes a third longer (docs/experiments.md)."""
SERVER_BYTES = 1.5 * GIB
"""What vLLM takes beside weights and KV cache: its context, activations of a prompt and CUDA graphs."""
MAX_SEQUENCES = 256
"""Answers written at once, as many as are asked for at once; a server's own default may be half."""
TOGETHER = 16
"""Sequences of full length for which a server must have room where several share a card: with fewer, one after another
on all of the card is faster."""
NF4 = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight of QLoRA's base: 4, and a scale of 8 bits for each 64, itself scaled in blocks of 256 (Dettmers et al.
2023, arXiv:2305.14314)."""


class Parts(NamedTuple):
    """Bytes, by what they are for."""

    weights: float
    adapter: float = 0
    """LoRA weights, their gradients and AdamW's two moments."""
    activations: float = 0
    """What the backward pass needs again, or calibration keeps."""
    logits: float = 0
    work: float = 0
    """What one layer is worked on with."""
    runtime: float = RUNTIME
    fragmentation: float = 0
    """What the heap keeps and does not use."""

    @property
    def total(self) -> float:
        return sum(self)


def weights(shape: Shape, bits: int = 16, group: int = 128) -> float:
    """Bytes of the weights as they lie on the disk and on a card: linear layers in 4, 8, 16 or 32 bits, with a 16-bit
    scale and a zero point a group (which classic GPTQ stores even where all are alike); the rest in 16 (32 with 32)."""
    if bits >= 16:
        return shape.parameters * bits / 8
    each = bits + (16 + bits) / group
    return shape.linear_parameters * each / 8 + shape.other_parameters * 2


def weights_on_disk(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def kv_per_token(shape: Shape, bytes_each: int = 2) -> int:
    """Bytes of keys and values a token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_each


def cache(usable: float, loaded: float) -> float:
    """Bytes that vLLM has for keys and values in so many of a card's, beside loaded weights; at least 0."""
    return max(0.0, usable - loaded - SERVER_BYTES)


def side_by_side_cache(usable: float, loaded: Sequence[float], longest: float) -> float | None:
    """Bytes that servers standing side by side on a card have for keys and values, each; None where that is too little
    to be worth it.

    Args:
        usable: bytes of the card that they may use.
        loaded: bytes of each server's weights.
        longest: bytes of the keys and values of a sequence of full length.
    """
    each = cache(usable / len(loaded), sum(loaded) / len(loaded))
    return each if each >= TOGETHER * longest else None


def lora_parameters(shape: Shape, rank: int) -> int:
    """Of an adapter on all linear layers."""
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
    """Bytes that LoRA training takes on each card, or in host memory.

    Args:
        shape: the base.
        rank: LoRA rank, on all linear layers.
        tokens: of one forward pass: sequences times their length.
        scored: completion tokens among them; only these have logits.
        bytes_each: of a weight and an activation: 2 in bfloat16, 4 in float32.
        checkpointing: whether activations are computed again in the backward pass, layer by layer.
        qlora: whether the base is in 4 bits.
        cards: that share weights and adapter (FSDP2, ZeRO-3); more than one holds two whole layers at a time besides;
            0 is host memory.
    """
    base = float(shape.parameters * bytes_each)
    if qlora:
        base = shape.linear_parameters * NF4 / 8 + shape.other_parameters * bytes_each
    layer = tokens * _kept(shape, rank, bytes_each)
    inputs = tokens * shape.hidden * bytes_each
    gathered = 2 * shape.linear_parameters / shape.layers * bytes_each if cards > 1 else 0
    shares, host = max(1, cards), cards == 0
    return Parts(
        weights=base / shares,
        adapter=16 * lora_parameters(shape, rank) / shares,
        activations=layer + shape.layers * inputs if checkpointing else shape.layers * layer,
        # In the model's format, and in float32: the logits, their logarithms of probabilities and the gradient.
        logits=scored * shape.vocabulary * (12 + (bytes_each if bytes_each < 4 else 0)),
        work=gathered,
        runtime=LIBRARIES if host else RUNTIME,
        fragmentation=FRAGMENTATION * shape.parameters if host else 0,
    )


def _kept(shape: Shape, rank: int, bytes_each: int) -> float:
    """Bytes a token that a layer keeps for its backward pass."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (shape.hidden * 4 + 2 * shape.hidden * bytes_each)  # float32 inside, as it came and scaled
    attention = (
        3 * queries + 2 * keys + 2 * queries
    ) * bytes_each  # turned, and keys and values for every head; output
    mlp = 4 * shape.intermediate * bytes_each  # gate, its activation, up, their product
    lora = len(shape.linears) * rank * 4
    copies = (
        0.0 if bytes_each == 4 else 4.0 * (2 * shape.hidden + queries + shape.intermediate)
    )  # for the float32 adapter
    return norms + attention + mlp + lora + copies


def quantising(shape: Shape, samples: int, tokens: int, *, bytes_each: int = 2) -> Parts:
    """Bytes of host memory that GPTQ takes, one layer worked on at a time.

    Args:
        shape: the merged model.
        samples: calibration texts.
        tokens: of one text on average.
        bytes_each: of a weight: 2 in bfloat16, 4 in float32.
    """
    hessians = 4 * sum(linear.inputs**2 for linear in shape.linears)
    largest = max(shape.linears, key=lambda linear: linear.inputs * linear.outputs)
    inverse = 4 * (2 * max(linear.inputs for linear in shape.linears) ** 2 + 2 * largest.inputs * largest.outputs)
    return Parts(
        weights=shape.parameters * bytes_each,
        activations=2 * samples * tokens * shape.hidden * bytes_each,
        work=hessians + inverse,
    )


def answering(shape: Shape, rows: int, tokens: int, *, bytes_each: int = 4) -> Parts:
    """Bytes of host memory that answering in this process takes.

    Args:
        shape: the model; 4-bit weights are unpacked.
        rows: requests at once.
        tokens: of the longest prompt and answer.
        bytes_each: of a weight, a key and a value: 2 in bfloat16, 4 in float32.
    """
    return Parts(
        weights=shape.parameters * bytes_each,
        activations=rows * tokens * kv_per_token(shape, bytes_each),
        logits=rows * shape.vocabulary * 4,
    )


def free() -> int | None:
    """Bytes of host memory that this process may still take, the limit of its control group (cgroup v2) included; None
    where that cannot be read."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    if found is None:
        return None
    group = Path("/sys/fs/cgroup")
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    machine = int(found[1]) * 1024
    return min(machine, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else machine


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
