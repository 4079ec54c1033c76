"""Weights in 4 or 8 bits, by GPTQ or by rounding, in the compressed-tensors format that vLLM and transformers read.

GPTQ: Frantar et al. 2022, arXiv:2210.17323, through llm-compressor; columns in the order of their activations, stored
in the layer's own order ("static"), which every vLLM kernel takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder import models
from stepladder.config import Dtype, Quantise
from stepladder.errors import GateError, ModelError
from stepladder.models import template
from stepladder.models.files import read_json
from stepladder.models.weight_files import WeightFiles

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier

GROUP_SIZES = (128, 64, 32, 16)
"""Tried in this order where the configuration names none."""
FITTED = "memoryless_mse"
"""How llm-compressor sets the scales of symmetric weights for GPTQ: by the least error. By default it takes the largest
weight divided by 7.5, half a step off the grid of -8 to 7: in every group it is cut or rounded by half a step, and
GPTQ, which keeps the scales, does not make up for it (docs/experiments.md)."""
MAX_MISFIT = 0.1
"""How far off the scales of a layer may be on average (:func:`misfits`)."""
MAX_RELATIVE_MISFIT = 0.5
"""A larger misfit may still be this share of what the scales of other rows would give: GPTQ moves weights on purpose,
in Qwen2.5's value projections by more than :data:`MAX_MISFIT`."""


def quantise(
    settings: Quantise,
    merged: Path,
    calibration: Sequence[list[int]],
    folder: Path,
    layers_in_8_bits: Collection[str] = (),
    dtype: Dtype = "auto",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Quantise every linear layer but the head and write a model folder.

    Args:
        settings: bits, group size, and whether by GPTQ or by rounding to nearest.
        merged: the folder with the weights.
        calibration: token ids of whole texts; rounding ignores them.
        folder: what is written.
        layers_in_8_bits: names of layers that get 8 bits whatever the others have.
        dtype: number format that is computed in.
        report: called with how many layers calibration has come to, of how many; not when rounding.

    Raises:
        ModelError: ``group_size`` does not divide a layer's input width.
        TemplateError: ``merged`` has another template than it was trained with.
    """
    silence()
    models.require("compressed_tensors", "datasets", "llmcompressor")
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    tokenizer = models.load_tokenizer(merged)
    template.check(tokenizer, merged)
    model = models.load(merged, dtype, move=False)  # llm-compressor moves one layer at a time to a card
    layers = linears(model)
    size = group_size(settings, layers)
    with models.quiet():
        if settings.method == "gptq":
            rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
            with _counting(layers, report):
                oneshot(
                    model=model,
                    dataset=Dataset.from_list(rows),
                    recipe=gptq_modifier(settings, size, layers, layers_in_8_bits),
                    max_seq_length=max(map(len, calibration)),
                    num_calibration_samples=len(rows),
                    shuffle_calibration_samples=False,
                    log_dir=None,
                )
        else:
            groups = _groups(settings, size, layers, layers_in_8_bits)
            oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]), log_dir=None)
        # Before it is packed, so that the integers are those of the scales as they are stored.
        model.to(torch.bfloat16).save_pretrained(folder, save_compressed=True)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)


@contextlib.contextmanager
def _counting(layers: Mapping[str, torch.nn.Linear], report: Callable[[int, int], None]) -> Iterator[None]:
    """Report every layer that is computed with for the first time: llm-compressor goes from one to the next."""
    reached: set[torch.nn.Module] = set()

    def reach(layer: torch.nn.Module, _: object) -> None:
        if layer not in reached:
            reached.add(layer)
            report(len(reached), len(layers))

    hooks = [layer.register_forward_pre_hook(reach) for layer in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def silence() -> None:
    """Silence what llm-compressor and its libraries log, some of it at import, which would disturb the live view."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
    for name in ("llmcompressor", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


def gptq_modifier(
    settings: Quantise, size: int, layers: Collection[str] = (), layers_in_8_bits: Collection[str] = ()
) -> GPTQModifier:
    """llm-compressor's GPTQ with groups of ``size``; without ``layers_in_8_bits`` all linear layers get the same."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    groups = _groups(settings, size, layers, layers_in_8_bits)
    return GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static")


def _groups(
    settings: Quantise, size: int, layers: Collection[str], layers_in_8_bits: Collection[str]
) -> dict[str, QuantizationScheme]:
    others = [name for name in layers if name not in layers_in_8_bits]
    groups = {"weights": _scheme(settings, size, settings.bits, others if layers_in_8_bits else ["Linear"])}
    if layers_in_8_bits:
        groups["worst"] = _scheme(settings, size, 8, sorted(layers_in_8_bits))
    return groups


def _scheme(settings: Quantise, size: int, bits: int, targets: list[str]) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

    fits_range = settings.symmetric and settings.method == "gptq"
    weights = QuantizationArgs(
        num_bits=bits,
        group_size=size,
        symmetric=settings.symmetric,
        strategy=QuantizationStrategy.GROUP,
        observer=FITTED if fits_range else None,
    )
    return QuantizationScheme(targets=targets, weights=weights)


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers that are quantised: every linear one but the head."""
    import torch

    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


def group_size(settings: Quantise, layers: dict[str, torch.nn.Linear]) -> int:
    """The group size asked for, else the largest of :data:`GROUP_SIZES` that divides every layer's input width.

    Raises:
        ModelError: it does not divide one, naming it.
    """
    usual = GROUP_SIZES if settings.backend == "llmcompressor" else GROUP_SIZES[:-1]
    sizes = usual if settings.group_size is None else (settings.group_size,)
    for size in sizes:
        if all(layer.in_features % size == 0 for layer in layers.values()):
            return size
    name, layer = next((name, layer) for name, layer in layers.items() if layer.in_features % sizes[-1])
    raise ModelError(
        f"[quantise] group_size {sizes[-1]} does not divide the {layer.in_features} inputs of {name}; use a divisor"
    )


def inspect(folder: Path, settings: Quantise, merged: Path) -> None:
    """Check an export: config.json claims the bits and the group size of ``settings``, and the scales have the shapes
    that these imply, are finite, and fit the merged weights (:func:`misfits`).

    Raises:
        GateError: one of these does not hold, naming the layer.
    """
    models.require()
    import torch
    from safetensors import safe_open

    claimed = claims(folder)
    if settings.group_size is not None and any(size != settings.group_size for _, size in claimed):
        raise GateError(
            f"{folder}: config.json says groups of {claimed[0][1]}, [quantise] of {settings.group_size}; quantise again"
        )
    if min(bits for bits, _ in claimed) != settings.bits:
        raise GateError(
            f"{folder}: config.json says {claimed[0][0]} bits, [quantise] says {settings.bits}; quantise again"
        )
    scales: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no dictionary)
                if not re.search(r"\.(weight_scale|scales)$", name):
                    continue
                scale = file.get_tensor(name)
                layer = name.rpartition(".")[0]
                if not torch.isfinite(scale).all():
                    raise GateError(f"{folder}: {layer} has scales that are not numbers; quantise again")
                if name.endswith("weight_scale"):
                    width, groups = int(file.get_tensor(f"{layer}.weight_shape")[1]), scale.shape[1]
                else:
                    width, groups = len(file.get_tensor(f"{layer}.g_idx")), scale.shape[0]
                if all(groups * size != width for _, size in claimed):
                    raise GateError(
                        f"{folder}: {layer} has {groups} scales for {width} inputs, but config.json says groups of "
                        f"{claimed[0][1]}; quantise again"
                    )
                scales[layer] = scale if name.endswith("weight_scale") else scale.T
    if not scales:
        raise GateError(f"{folder}: no layer has scales, so nothing is quantised; quantise again")
    for layer, (own, other) in misfits(merged, folder, scales).items():
        if own > max(MAX_MISFIT, MAX_RELATIVE_MISFIT * other):
            raise GateError(
                f"{folder}: the scales of {layer} do not fit its weights (off by {100 * own:.0f} % on average, "
                f"those of other rows by {100 * other:.0f} %); the export is damaged: quantise again"
            )


class Misfit(NamedTuple):
    """How far a layer's scales are off, as a share, on average over its groups."""

    own: float
    other: float
    """The same with the scales of the row above."""


def misfits(merged: Path, folder: Path, scales: Mapping[str, torch.Tensor]) -> dict[str, Misfit]:
    """How far the scales of each layer are off. In a group, <w, q> / <q, q> is the factor by which the dequantised
    weights q fit the merged weights w best; the misfit is its mean distance from 1. Rounding and GPTQ leave 0.01 to
    0.04 in 4 bits; scales of other rows leave 0.2. One layer at a time is in memory.

    Args:
        merged: folder of the weights that were quantised.
        folder: folder of the quantised weights.
        scales: by layer, shape (outputs, groups).
    """
    import torch

    weights, quantised_weights = WeightFiles(merged), WeightFiles(folder)
    by_layer = {}
    for name in linears(models.skeleton(merged)):
        scale = scales[name].float()
        w = weights.read(f"{name}.weight", torch.float32).reshape(*scale.shape, -1)  # (outputs, groups, of a group)
        q = quantised_weights.read(f"{name}.weight", torch.float32).reshape(w.shape)
        factor = (w * q).sum(-1) / (q * q).sum(-1).clamp_min(1e-12)
        nonzero = q.any(-1)
        other = (factor * scale / scale.roll(1, 0).clamp_min(1e-12))[nonzero]
        means = [float((part - 1).abs().mean()) if nonzero.any() else 1.0 for part in (factor[nonzero], other)]
        by_layer[name] = Misfit(*means)
    return by_layer


def claims(folder: Path) -> list[tuple[int, int]]:
    """(bits, group size) of every kind of layer, as the export's config.json has them.

    Raises:
        GateError: config.json names no quantisation.
    """
    config = read_json(folder / "config.json").get("quantization_config")
    if config is None:
        raise GateError(f"{folder}: config.json names no quantisation; quantise again")
    if config["quant_method"] == "gptq":
        return [(int(config["bits"]), int(config["group_size"]))]
    kinds = [group["weights"] for group in config["config_groups"].values()]
    return [(int(kind["num_bits"]), int(kind["group_size"])) for kind in kinds]
