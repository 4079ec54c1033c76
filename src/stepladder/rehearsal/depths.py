"""From two shallow models to a deep one: layers repeat, so every peak grows linearly with their number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from stepladder.errors import ModelError
from stepladder.forecast.model_shape import Shape
from stepladder.rehearsal.tracking import Bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHALLOW, DEEPER = 3, 4
"""Layers of the two models. A first, a last and a middle layer differ: sharded weights are fetched ahead in between."""


def backward(place: int) -> str:
    """The phase in which gradients pass through a layer; 0 is the last layer, which comes first."""
    return f"backward of layer -{place + 1}"


def at_depth(layers: int, rehearse: Callable[[int], Mapping[str, Bytes]]) -> Bytes:
    """The bytes by kind of the highest peak in a model of so many layers.

    Args:
        layers: of the whole model.
        rehearse: the peaks by phase of a model of so many layers.
    """
    if layers <= DEEPER:
        return max(rehearse(layers).values(), key=Counter.total)
    shallow, deeper = rehearse(SHALLOW), rehearse(DEEPER)
    more = layers - DEEPER
    phases = {
        phase: _sum(deeper[phase], _difference(deeper[phase], shallow[phase]), more)
        for phase in deeper
        if phase in shallow and not phase.startswith("backward of layer")
    }
    if backward(0) in deeper:
        for place, before in ((0, 0), (1, 1), (DEEPER - 1, SHALLOW - 1)):
            growth = _difference(deeper[backward(place)], shallow[backward(before)])
            phases[backward(place)] = _sum(deeper[backward(place)], growth, more)
        step = _difference(deeper[backward(2)], deeper[backward(1)])  # from one middle layer to the next
        phases[backward(2)] = _sum(phases[backward(1)], step, layers - 3)
    return max(phases.values(), key=Counter.total)


def _difference(larger: Bytes, smaller: Bytes) -> Bytes:
    return Counter({kind: larger[kind] - smaller[kind] for kind in {*larger, *smaller}})


def _sum(start: Bytes, growth: Bytes, times: int) -> Bytes:
    return Counter({kind: start[kind] + times * growth[kind] for kind in {*start, *growth}})


def skeleton(architecture: Mapping[str, Any], layers: int) -> PreTrainedModel:
    """A model on the meta device, with as many layers.

    Args:
        architecture: what config.json says.
        layers: instead of its own number.

    Raises:
        ModelError: transformers knows no such architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(copy.deepcopy(dict(architecture)))
    kind = settings.pop("model_type", None)
    for key in ("layer_types", "quantization_config", "auto_map"):
        settings.pop(key, None)
    settings["num_hidden_layers"] = layers
    if settings.get("max_window_layers"):
        settings["max_window_layers"] = layers
    try:
        config = AutoConfig.for_model(kind, **settings)
        with torch.device("meta"):
            return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"config.json: no model to rehearse with ({str(error)[:200]}); give a causal language model"
        ) from None


def architecture(shape: Shape) -> dict[str, Any]:
    """The config.json of a model of the Qwen2.5 family, by its shape."""
    return {
        "model_type": "qwen2",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }
