"""The weights of a model folder, read and unpacked one tensor at a time from its safetensors files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder.errors import ModelError
from stepladder.models.files import read_json
from stepladder.models.gptq_format import dequantise

if TYPE_CHECKING:
    import torch

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""The tensors that a layer's weight is made of in the formats ``gptq`` and compressed-tensors (``pack-quantized``)."""


class WeightFiles:
    """The tensors of a folder by the names that the unquantised model gives them.

    Nothing stays in memory but the names: a tensor belongs to the caller.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> set[str]:
        """The names of all weights, those of quantised layers included."""
        names = set()
        for name in self._file_of:
            layer, _, part = name.rpartition(".")
            names.add(f"{layer}.weight" if part in (*GPTQ_PARTS, *PACKED_PARTS) else name)
        return names

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A weight in ``dtype``, by default as it is stored; quantised ones are unpacked.

        Raises:
            ModelError: it is not there, or a tensor that it is packed in is not.
        """
        layer = name.removesuffix(".weight")
        if name in self._file_of:
            weight = self._read(name)
        elif f"{layer}.qweight" in self._file_of:
            weight = dequantise({part: self._read(f"{layer}.{part}") for part in GPTQ_PARTS}, self._settings)
        elif f"{layer}.weight_packed" in self._file_of:
            weight = self._unpack(layer, dtype)
        else:
            raise self._missing(name)
        return weight if dtype is None else weight.to(dtype)

    def _read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise self._missing(name)
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def _missing(self, name: str) -> ModelError:
        return ModelError(
            f"{self.folder}: the model cannot be loaded (tensor {name} is missing); give a complete, undamaged folder"
        )

    @functools.cached_property
    def _settings(self) -> dict[str, object]:
        settings: dict[str, object] = read_json(self.folder / "config.json")["quantization_config"]
        return settings

    def _unpack(self, layer: str, dtype: torch.dtype | None) -> torch.Tensor:
        """The weight of a layer that compressed-tensors packed, computed in ``dtype`` as transformers does."""
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

        stored = {part for part in PACKED_PARTS if f"{layer}.{part}" in self._file_of}
        parts = {part: self._read(f"{layer}.{part}") for part in stored}
        width, scale = int(parts["weight_shape"][1]), parts["weight_scale"]
        parts["weight_scale"] = scale if dtype is None else scale.to(dtype)
        settings = QuantizationArgs(
            num_bits=32 * parts["weight_packed"].shape[1] // width,
            group_size=width // scale.shape[1],
            symmetric="weight_zero_point" not in parts,
            strategy=QuantizationStrategy.GROUP,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=settings)
        weight: torch.Tensor = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        return weight


def replace_tensor(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Overwrite a tensor in a safetensors file, of which nothing else is read.

    The format: 8 bytes with the header's length, little-endian; the header, a JSON object with each tensor's type,
    shape and where its bytes begin and end after the header (https://huggingface.co/docs/safetensors, read 2026-11).

    Raises:
        ValueError: the stored tensor has another size.
    """
    import torch

    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    with file.open("r+b") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        start, end = json.loads(opened.read(header_bytes))[name]["data_offsets"]
        if end - start != content.nbytes:
            raise ValueError(f"{file}: tensor {name} has {end - start} bytes, not {content.nbytes}")
        opened.seek(8 + header_bytes + start)
        opened.write(content.data)
