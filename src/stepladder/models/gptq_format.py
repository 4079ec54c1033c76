"""Model folders in the classic ``gptq`` format, unpacked for computing with torch alone.

Rows of ``qweight`` and columns of ``qzeros`` hold 32 / bits values each, the first in the lowest bits; zero points are
stored less one, except where the format calls itself ``gptq_v2``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_gptq(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model from a folder whose config.json says ``"quant_method": "gptq"``.

    Raises:
        ValueError: tensors are missing, or are not the model's.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    packed: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        packed |= load_file(shard)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=dtype))  # type: ignore[no-untyped-call]
    weights = {name: tensor for name, tensor in packed.items() if not name.endswith((".g_idx", ".qzeros", ".scales"))}
    for name in [name for name in weights if name.endswith(".qweight")]:
        del weights[name]
        layer = name.removesuffix(".qweight")
        weights[f"{layer}.weight"] = _weight(packed, layer, settings).to(dtype)
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    if lost := [*unknown, *(set(missing) - tied)]:
        raise ValueError(f"tensor {sorted(lost)[0]} is missing or not the model's")
    model.tie_weights()
    return model


def _weight(packed: Mapping[str, torch.Tensor], layer: str, settings: Mapping[str, Any]) -> torch.Tensor:
    """One layer's weights, shape (outputs, inputs), float32."""
    bits = int(settings["bits"])
    values = _spread(packed[f"{layer}.qweight"].T, bits).T  # (inputs, outputs)
    zeros = _spread(packed[f"{layer}.qzeros"], bits)  # (groups, outputs)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1
    group = packed[f"{layer}.g_idx"].long()  # (inputs,)
    scales = packed[f"{layer}.scales"].float()
    return (scales[group] * (values - zeros[group])).T.contiguous()


def _spread(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shape (rows, words) to (rows, words * 32 / bits)."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    spread: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return spread.flatten(-2)
