"""The GPTQ of one decoder layer on fake tensors, by llm-compressor's own modifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stepladder.config import Quantise
from stepladder.quantising import gptq
from stepladder.rehearsal.tracking import Bytes, LiveMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rehearse_layer(model: PreTrainedModel, tokens: int, settings: Quantise) -> dict[str, Bytes]:
    """The peaks on a card that holds one decoder layer at a time, as llm-compressor's pipeline does: while Hessians are
    summed up, while the layer is quantised, and while the head computes logits.

    Args:
        model: of one layer, on the meta device, in the number format of the merged weights.
        tokens: in the longest calibration text.
        settings: ``[quantise]``.
    """
    from llmcompressor.core import Event, State

    _skip_column_updates()
    _remember_range(settings.bits)
    modifier = gptq.gptq_modifier(settings, gptq.group_size(settings, gptq.linears(model)))
    memory = LiveMemory(model.config.vocab_size)
    memory.fake_weights(model)
    state, event = State(model=model), Event()
    with memory.mode:
        states = torch.empty(1, tokens, model.config.hidden_size, dtype=model.dtype)
        modifier.on_initialize(state)
    layer, rotary = (_only(model, name) for name in ("DecoderLayer", "RotaryEmbedding"))
    with torch.no_grad(), memory.mode, memory:
        memory.hold(list(layer.parameters()), "weights")
        memory.hold(states, "activations")
        memory.phase = "calibration"
        modifier.on_calibration_start(state, event)
        layer(states, position_embeddings=rotary(states, torch.arange(tokens)[None]), attention_mask=None)
        memory.hold(list(modifier._hessians.values()), "hessians")
        memory.phase = "quantising"
        modifier.on_sequential_epoch_end(state, event, list(layer.modules()))
    head = LiveMemory(model.config.vocab_size)
    with torch.no_grad(), memory.mode, head:
        head.phase = "head"
        head.hold(list(model.get_output_embeddings().parameters()), "weights")  # type: ignore[no-untyped-call]
        head.hold(states, "activations")
        model.get_output_embeddings()(states)  # type: ignore[no-untyped-call]
    return {**memory.peaks, **head.peaks}


def _only(model: torch.nn.Module, ending: str) -> Any:
    return next(module for module in model.modules() if type(module).__name__.endswith(ending))


def _remember_range(bits: int) -> None:
    """Let compressed-tensors make the range of quantised numbers outside the fake mode: it keeps the tensors of its
    first call for the whole process, where a fake one would break every later quantisation."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_range

    calculate_range(QuantizationArgs(num_bits=bits), torch.device("cpu"))


def _skip_column_updates() -> None:
    """On fake tensors, let llm-compressor leave out the loop over a block's columns, which a kernel does in place on
    cards: in Python it would take a minute for each layer."""
    from compressed_tensors.utils.impl_backend import ImplBackend

    if "_skip_on_fake_tensors" in ImplBackend._fn_registry:
        return

    def _skip_on_fake_tensors(*args: Any, **kwargs: Any) -> None:
        pass

    def is_fake(weights: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        return isinstance(weights, FakeTensor)

    ImplBackend.register("gptq_block_update", is_fake, 0)(_skip_on_fake_tensors)
