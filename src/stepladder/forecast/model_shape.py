"""The shape of a model, from which its memory and speed follow: read from its config.json, or known by its id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from stepladder.errors import ModelError
from stepladder.models.files import read_json


class Linear(NamedTuple):
    """A linear layer: the sizes of its input and output."""

    inputs: int
    outputs: int


class Shape(NamedTuple):
    """Sizes of a decoder with attention and a gated MLP (Llama, Qwen2, Qwen3, Mistral and similar)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output head shares the embeddings' weights."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer: query, key, value, output; gate, up, down. These get LoRA and are
        quantised."""
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
        """Parameters of all these linear layers."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """Parameters of embeddings, head and norms, which are never quantised (biases are left out)."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


def _qwen(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, tied: bool) -> Shape:
    vocabulary = 151_936 if tied else 152_064
    return Shape(layers, hidden, intermediate, heads, kv_heads, 64 if hidden == 896 else 128, vocabulary, tied)


QWEN25_SHAPES = {
    "0.5B": _qwen(24, 896, 4864, 14, 2, tied=True),
    "1.5B": _qwen(28, 1536, 8960, 12, 2, tied=True),
    "3B": _qwen(36, 2048, 11008, 16, 2, tied=True),
    "7B": _qwen(28, 3584, 18944, 28, 4, tied=False),
    "14B": _qwen(48, 5120, 13824, 40, 8, tied=False),
    "32B": _qwen(64, 5120, 27648, 40, 8, tied=False),
    "72B": _qwen(80, 8192, 29568, 64, 8, tied=False),
}
"""The Qwen2.5 models by size, from their published config.json files, so that a plan needs no download."""


def qwen25(model_id: str) -> Shape | None:
    """The shape of a model of the Qwen2.5 family by its id, such as ``Qwen/Qwen2.5-32B-Instruct``; None for others."""
    size = re.search(r"qwen2\.5-(?:coder-|math-)?(\d+(?:\.\d+)?b)\b", model_id, re.IGNORECASE)
    return QWEN25_SHAPES.get(size[1].upper()) if size else None


def read(folder: Path) -> Shape:
    """The shape of the model in a folder, from its config.json.

    Raises:
        ModelError: config.json lacks a field, which the message names, or a field is no number.
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
        raise ModelError(f"{path}: no {error}; memory can be planned only for models like Llama and Qwen2") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{path}: a size is no number ({error}); give an undamaged folder") from None
