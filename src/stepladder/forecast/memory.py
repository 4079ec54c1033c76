"""How many bytes weights, KV cache, LoRA training and quantising take: arithmetic on a model's shape, nothing measured.

benchmarks/memory.py holds it against what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.errors import ModelError
from stepladder.models.files import read_json

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
SERVER = 1.5 * GIB
"""What vLLM takes beside weights and KV cache: its context, activations of a prompt and CUDA graphs."""
SEQUENCES = 256
"""Answers written at once, as many as are asked for at once; a server's own default may be half."""
TOGETHER = 16
"""Sequences of full length for which a server must have room where several share a card: with fewer, one after another
on all of the card is faster."""
NF4 = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight of QLoRA's base: 4, and a scale of 8 bits for each 64, itself scaled in blocks of 256 (Dettmers et al.
2023, arXiv:2305.14314)."""


class Linear(NamedTuple):
    """A linear layer: how many numbers it reads and writes a token."""

    inputs: int
    outputs: int


class Shape(NamedTuple):
    """What a decoder is made of (Llama, Qwen2, Qwen3, Mistral and the like: attention and a gated MLP)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head shares the embeddings' weights."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of one layer: query, key, value, output; gate, up, down. These carry LoRA and are quantised."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear(self.hidden, queries),
            Linear(self.hidden, keys),
            Linear(self.hidden, keys),
            Linear(queries, self.hidden),
            Linear(self.hidden, self.intermediate),
            Linear(self.hidden, self.intermediate),
            Linear(self.intermediate, self.hidden),
        )

    @property
    def linear_parameters(self) -> int:
        """Of all layers."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """Embeddings, head and norms, which are never quantised (biases are left out)."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


def _qwen(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, tied: bool) -> Shape:
    vocabulary = 151_936 if tied else 152_064
    return Shape(layers, hidden, intermediate, heads, kv_heads, 64 if hidden == 896 else 128, vocabulary, tied)


KNOWN = {
    "0.5B": _qwen(24, 896, 4864, 14, 2, tied=True),
    "1.5B": _qwen(28, 1536, 8960, 12, 2, tied=True),
    "3B": _qwen(36, 2048, 11008, 16, 2, tied=True),
    "7B": _qwen(28, 3584, 18944, 28, 4, tied=False),
    "14B": _qwen(48, 5120, 13824, 40, 8, tied=False),
    "32B": _qwen(64, 5120, 27648, 40, 8, tied=False),
    "72B": _qwen(80, 8192, 29568, 64, 8, tied=False),
}
"""The Qwen2.5 family, from its published config.json files, so that a plan needs no download."""


def known(name: str) -> Shape | None:
    """The shape of a model of the Qwen2.5 family by its id, such as ``Qwen/Qwen2.5-32B-Instruct``; None of others."""
    found = re.search(r"qwen2\.5-(?:coder-|math-)?(\d+(?:\.\d+)?b)\b", name, re.IGNORECASE)
    return KNOWN.get(found[1].upper()) if found else None


def read(folder: Path) -> Shape:
    """The shape of the model in a folder, from its config.json.

    Raises:
        ModelError: it is of another kind, naming the field that is not there.
    """
    path = folder / "config.json"
    config = read_json(path)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings")),
        )
    except KeyError as error:
        raise ModelError(f"{path}: no {error}; memory is planned for models of the Llama and Qwen2 kind only") from None


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


def kv_per_token(shape: Shape, bytes_each: int = 2) -> int:
    """Bytes of keys and values a token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_each


def cache(usable: float, loaded: float) -> float:
    """Bytes that vLLM has for keys and values in so many of a card's, beside loaded weights; at least 0."""
    return max(0.0, usable - loaded - SERVER)


def shared(usable: float, loaded: Sequence[float], longest: float) -> float | None:
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
