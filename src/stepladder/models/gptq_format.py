"""Load model folders in the ``gptq`` format, with their weights unpacked so that PyTorch alone computes with them.

Each 32-bit word holds 32 / bits values, the first in the lowest bits: consecutive inputs of a weight in ``qweight``,
consecutive outputs of the zero points in ``qzeros``. Zero points are stored minus one, except in ``gptq_v2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stepladder.models.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_gptq(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model from a folder whose config.json says ``"quant_method": "gptq"``.

    Raises:
        ValueError: tensors are missing, or do not belong to the model.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    packed: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        packed |= load_file(shard)
    settings = read_json(folder / "config.json")["quantization_config"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=dtype))  # type: ignore[no-untyped-call]
    weights = {name: tensor for name, tensor in packed.items() if not name.endswith((".g_idx", ".qzeros", ".scales"))}
    for name in [name for name in weights if name.endswith(".qweight")]:
        del weights[name]
        layer = name.removesuffix(".qweight")
        weights[f"{layer}.weight"] = _weight(packed, layer, settings).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    if mismatched := [*unexpected, *(set(missing) - tied)]:
        raise ValueError(f"tensor {sorted(mismatched)[0]} is missing or does not belong to the model")
    model.tie_weights()
    return model


def _weight(packed: Mapping[str, torch.Tensor], layer: str, settings: Mapping[str, Any]) -> torch.Tensor:
    """One layer's weights, shape (outputs, inputs), float32."""
    bits = int(settings["bits"])
    values = _unpack_words(packed[f"{layer}.qweight"].T, bits).T  # (inputs, outputs)
    zeros = _unpack_words(packed[f"{layer}.qzeros"], bits)  # (groups, outputs)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1
    group = packed[f"{layer}.g_idx"].long()  # (inputs,)
    scales = packed[f"{layer}.scales"].float()
    return (scales[group] * (values - zeros[group])).T.contiguous()


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack words of shape (rows, words) into values of shape (rows, words * 32 / bits)."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)
