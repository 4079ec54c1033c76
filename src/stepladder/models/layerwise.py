"""A model folder computed one decoder layer at a time, for weights that memory does not hold, or not twice.

In memory are at most the weights of one decoder layer, or of the embeddings, or of the head, and the hidden states of
all rows. Every layer is read once. The model's own code computes, in the order of an ordinary forward pass, so that
results are the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.config import Dtype
from stepladder.errors import ModelError
from stepladder.models.libraries import require
from stepladder.models.loading import loading, set_weight, skeleton
from stepladder.models.number_format import has_cuda, prepare_dtype
from stepladder.models.weight_files import WeightFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MIN_SCORED = 16
"""Tokens that the head is computed for at a time: products of fewer use kernels that sum in another order
(docs/determinism.md)."""


class Layerwise:
    """A causal language model on the machine's device of which only what is being computed has weights.

    Args:
        folder: a model folder; quantised weights are unpacked.
        dtype: number format to compute in.
        adapter: folder of a LoRA adapter to compute with, in float32.

    Raises:
        ModelError: the folder is not a model, or its layers are not where they are looked for.
    """

    def __init__(self, folder: Path, dtype: Dtype = "auto", adapter: Path | None = None) -> None:
        require()
        import torch

        self._folder, self._dtype = folder, prepare_dtype(dtype)
        self._device = "cuda" if has_cuda() else "cpu"
        self.model: PreTrainedModel = skeleton(folder, dtype)
        """Hooks may be registered on its layers."""
        layers = getattr(self.model.base_model, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList):
            raise ModelError(f"{folder}: its layers are not where Llama and Qwen2 have them; use a model like these")
        self._layers: list[torch.nn.Module] = list(layers)
        if adapter is not None:
            _add_lora(self.model, adapter)
        self._adapter = None if adapter is None else WeightFiles(adapter)
        with loading("model", folder):
            self._files = WeightFiles(folder)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The last layer's output for every row of token ids, before the final norm; each of shape (1, tokens,
        hidden)."""
        import torch

        head: torch.nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        hidden: list[torch.Tensor] = []
        settings: list[list[dict[str, Any]]] = []  # by row and layer, what the model calls the layer with
        with torch.no_grad():
            with self._weights(self._outside(head)):
                for ids in rows:
                    tokens = torch.tensor([list(ids)], device=self._device)
                    with self._bypassed() as calls:
                        self.model.base_model(input_ids=tokens, use_cache=False)
                    hidden.append(calls[0][0])
                    settings.append([keywords for _, keywords in calls])
            for index, layer in enumerate(self._layers):
                with self._weights(self._parameters(layer)):
                    for row, keywords in enumerate(settings):
                        hidden[row] = layer(hidden[row], **keywords[index])
        return hidden

    def log_probabilities(self, hidden: Sequence[torch.Tensor], scored: Sequence[range]) -> Iterator[torch.Tensor]:
        """For each row of :meth:`hidden_states` the log-probabilities of the next token at its ``scored`` positions;
        each of shape (scored tokens, vocabulary), float32, on the machine's device."""
        import torch

        with self._weights(self._outside(self.model.get_input_embeddings())):
            for states, positions in zip(hidden, scored, strict=True):
                with self._bypassed(), torch.no_grad():  # neither holds in the caller's code
                    log_probabilities = scored_log_probabilities(self.model, positions, inputs_embeds=states)
                yield log_probabilities

    def _parameters(self, module: torch.nn.Module) -> set[str]:
        """The names of a module's parameters in the model."""
        (prefix,) = [name for name, other in self.model.named_modules() if other is module]
        return {f"{prefix}.{name}" for name, _ in module.named_parameters()}

    def _outside(self, unused: torch.nn.Module) -> set[str]:
        """The names of parameters that belong to no layer, without those of one module."""
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return names.difference(self._parameters(unused), *map(self._parameters, self._layers))

    @contextlib.contextmanager
    def _bypassed(self) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
        """Layers that return what they are given, and the calls of them: the hidden states, and the rest."""
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def bypass(hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
            calls.append((hidden_states, keywords))
            return hidden_states

        for layer in self._layers:
            vars(layer)["forward"] = bypass
        try:
            yield calls
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    @contextlib.contextmanager
    def _weights(self, names: set[str]) -> Iterator[None]:
        """The model with the weights of these parameters."""
        empty = {name: self.model.get_parameter(name) for name in sorted(names)}
        try:
            with loading("model", self._folder):
                for name in empty:
                    set_weight(self.model, name, self._read(name).to(self._device))
            yield
        finally:
            for name, parameter in empty.items():
                set_weight(self.model, name, parameter.data)

    def _read(self, name: str) -> torch.Tensor:
        """The weight of a parameter: of the adapter, of the base, or that which it is tied to."""
        import torch

        if self._adapter is not None and ".lora_" in name:
            stored = f"base_model.model.{name.replace('.default.', '.')}"
            return self._adapter.read(stored, torch.float32)
        stored = name.replace(".base_layer.", ".")
        tied: dict[str, str] = self.model.all_tied_weights_keys
        return self._files.read(tied.get(stored, stored), self._dtype)


def scored_log_probabilities(model: torch.nn.Module, positions: range, **inputs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token at some positions of one row, shape (positions, vocabulary), float32. The
    head is computed for these only, so that no logits of whole rows are in memory."""
    import torch

    row = next(iter(inputs.values()))
    stop = min(row.shape[1], max(positions.stop, MIN_SCORED))
    first = max(0, min(positions.start, stop - MIN_SCORED))
    kept = torch.arange(first, stop, device=row.device)
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits[0]
    return torch.log_softmax(logits[positions.start - first : positions.stop - first].float(), -1)


def _add_lora(model: PreTrainedModel, adapter: Path) -> None:
    """Add the layers of an adapter to a model without weights."""
    require("peft")
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig.from_pretrained(str(adapter))
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
    model.train(False)
