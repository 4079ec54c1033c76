"""Merge a LoRA adapter into its base, shard by shard, and check that the result computes the same.

LoRA: Hu et al. 2021, arXiv:2106.09685; W' = W + (alpha / r) B A.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stepladder import models
from stepladder.config import Dtype
from stepladder.documents import Distance
from stepladder.errors import GateError, ModelError
from stepladder.isolation.folders import check_inside
from stepladder.models import template
from stepladder.models.files import read_json
from stepladder.models.weight_files import replace_tensor
from stepladder.records import Example
from stepladder.training.distance import compare, next_token_log_probabilities, rows_of

COMPARED_CONVERSATIONS = 8
"""Number of conversations on which the base with its adapter and the merged weights are compared."""
MAX_KL_NATS = 0.01
"""Limit on the mean KL divergence per token. Rounding to the base's own dtype causes about 1e-4 in bfloat16."""
CONFIGURATION_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Of a model folder, beside its weights and its tokenizer."""
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Merge an adapter into its base and write an ordinary model folder with the base's shards, names and dtype.

    Each product is computed in float32 and rounded once. In memory are the adapter and one weight at a time; the shards
    are copied as files.

    Raises:
        ModelError: the base is quantised, or the adapter does not fit it or is not plain LoRA.
        TemplateError: the adapter was trained with another chat template.
    """
    models.require("peft")
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    refuse_quantised(base)
    tokenizer = models.load_tokenizer(base)
    template.check(tokenizer, adapter)
    scale = _scale(adapter)
    lora = load_file(adapter / "adapter_model.safetensors")
    unused = {name.removesuffix(".lora_A.weight") for name in lora if name.endswith(".lora_A.weight")}
    device = "cuda" if models.has_cuda() else "cpu"
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            merged = shutil.copyfile(shard, folder / shard.name)
            for name in file.keys():  # noqa: SIM118  (no dictionary)
                module = f"base_model.model.{name.removesuffix('.weight')}"
                if module in unused:
                    unused.remove(module)
                    weight = file.get_tensor(name)
                    a, b = (lora[f"{module}.lora_{side}.weight"].to(device, torch.float32) for side in "AB")
                    weight = (weight.to(device, torch.float32) + scale * (b @ a)).to("cpu", weight.dtype)
                    replace_tensor(merged, name, weight)
    if unused:
        raise ModelError(f"{adapter}: {sorted(unused)[0]} is not in {base}; merge it into the base it was trained on")
    for name in CONFIGURATION_FILES:
        if (base / name).exists():
            check_inside(base / name, base)
            shutil.copyfile(base / name, folder / name)
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)


def adopt(model: Path, folder: Path) -> None:
    """Copy a finished model into a folder, as :func:`merge` leaves one: weights, configuration, tokenizer.

    Raises:
        ModelError: it is quantised.
        InputError: one of its files is a link that leads out of it.
        TemplateError: its tokenizer is not the one it was trained with.
    """
    refuse_quantised(model)
    tokenizer = models.load_tokenizer(model)
    template.check_folder(tokenizer, model)
    for path in sorted(model.iterdir()):
        if path.suffix == ".safetensors" or path.name in CONFIGURATION_FILES:
            check_inside(path, model)
            shutil.copyfile(path, folder / path.name)
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)


def adopt_adapter(adapter: Path, base: Path, folder: Path) -> str:
    """Copy a finished adapter into a folder, as training leaves one; returns the base that it says it was trained on.

    Raises:
        InputError: one of its files cannot be read, or is a link that leads out of it.
        TemplateError: it was trained with another chat template than the base's.
    """
    tokenizer = models.load_tokenizer(base)
    if (adapter / template.FINGERPRINT_FILE).exists():
        template.check(tokenizer, adapter)
    for name in (models.ADAPTER_CONFIG, models.ADAPTER_WEIGHTS):
        check_inside(adapter / name, adapter)
        shutil.copyfile(adapter / name, folder / name)
    template.write(tokenizer, folder)
    return str(read_json(folder / models.ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def refuse_quantised(base: Path) -> None:
    """Refuse a base with quantised weights, in which an adapter would be rounded away.

    Raises:
        ModelError: the base is quantised.
    """
    if "quantization_config" in read_json(base / "config.json"):
        raise ModelError(f"{base} is quantised; train on and merge into the unquantised base, then quantise the result")


def _scale(adapter: Path) -> float:
    """The factor of an adapter's product B A, alpha / r.

    Raises:
        ModelError: the adapter is not plain LoRA.
    """
    config = read_json(adapter / "adapter_config.json")
    for key, plain_values in _PLAIN_LORA.items():
        if key in config and config[key] not in plain_values:
            raise ModelError(f"{adapter}: {key} = {config[key]!r} is more than plain LoRA; merge it with PEFT")
    return float(config["lora_alpha"]) / float(config["r"])


def prove(
    base: Path, adapter: Path, merged: Path, examples: Sequence[Example], max_length: int, dtype: Dtype = "auto"
) -> Distance:
    """Compare the merged weights with the base and its adapter, on conversations of the training set.

    Raises:
        GateError: the KL divergence is larger than rounding explains.
    """
    rows = rows_of(models.load_tokenizer(base), examples[:COMPARED_CONVERSATIONS], max_length)
    adapted = next_token_log_probabilities(base, rows, dtype, adapter)
    distance = compare(adapted, next_token_log_probabilities(merged, rows, dtype))
    if distance.kl > MAX_KL_NATS:
        raise GateError(
            f"{merged}: merged weights are {distance.kl:.4f} nats a token away from base and adapter (limit "
            f"{MAX_KL_NATS}); the merge went wrong; delete it and merge again"
        )
    return distance
