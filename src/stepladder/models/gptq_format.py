"""Unpack weights in the ``gptq`` format, so that PyTorch alone computes with them.

Each 32-bit word holds 32 / bits values, the first in the lowest bits: consecutive inputs of a weight in ``qweight``,
consecutive outputs of the zero points in ``qzeros``. Zero points are stored minus one, except in ``gptq_v2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dequantise(parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> torch.Tensor:
    """One layer's weights, shape (outputs, inputs), float32.

    Args:
        parts: its ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.
        settings: ``quantization_config`` of the folder's config.json.
    """
    bits = int(settings["bits"])
    values = _unpack_words(parts["qweight"].T, bits).T  # (inputs, outputs)
    zeros = _unpack_words(parts["qzeros"], bits)  # (groups, outputs)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1
    group = parts["g_idx"].long()  # (inputs,)
    scales = parts["scales"].float()
    return (scales[group] * (values - zeros[group])).T.contiguous()


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack words of shape (rows, words) into values of shape (rows, words * 32 / bits)."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)
