"""One training step on fake tensors: LoRA or QLoRA, on one card or sharded over several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from stepladder.config import Train
from stepladder.rehearsal.depths import backward
from stepladder.rehearsal.tracking import Bytes, LiveMemory, know_bitsandbytes
from stepladder.training import trl
from stepladder.training.loss import collate, score_completions
from stepladder.training.sequences import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NF4_BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one, in bitsandbytes."""


def rehearse_step(
    model: PreTrainedModel,
    settings: Train,
    tokens: int,
    scored: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    cards: int = 1,
) -> dict[str, Bytes]:
    """The peak of each phase of a training step, on one of the cards.

    Args:
        model: on the meta device; it is changed.
        settings: ``[train]``: batch size, LoRA, qlora, accumulation.
        tokens: in each sequence of the batch.
        scored: completion tokens in the batch, which have logits.
        dtype: number format to compute in.
        checkpointing: whether activations are computed again.
        cards: that share weights and optimiser (FSDP2).
    """
    from peft import get_peft_model

    vocabulary = model.config.vocab_size
    model.to(dtype)  # type: ignore[arg-type]
    if settings.qlora:
        know_bitsandbytes()
        _pack(model, dtype)
    score_completions(model)
    if checkpointing and cards == 1:
        model.gradient_checkpointing_enable()
    with torch.device("meta"):
        tuned = get_peft_model(model, trl.lora(settings))
    trl.train_in_float32(tuned)
    if checkpointing and cards == 1:
        tuned.enable_input_require_grads()
    tuned.train()
    memory = LiveMemory(vocabulary)
    memory.fake_weights(tuned)
    with _process_group(cards), memory:
        if cards > 1:
            tuned = _shard(tuned, checkpointing)
        if settings.qlora:
            memory.hold(_scales(tuned, dtype, memory), "weights")
        memory.hold([p for p in tuned.parameters() if not p.requires_grad], "weights")
        trained = [p for p in tuned.parameters() if p.requires_grad]
        memory.hold(trained, "adapter")
        optimiser = torch.optim.AdamW(trained, fused=True)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        memory.hold([state for states in optimiser.state.values() for state in states.values()], "optimiser")
        accumulates = settings.gradient_accumulation // settings.devices > 1
        if accumulates:  # the gradients of earlier batches are there
            memory.hold([parameter.grad for parameter in trained], "gradients")
        else:
            optimiser.zero_grad()
        _watch_layers(tuned, memory, trained)
        memory.forget_peaks()
        memory.phase = "forward"
        rows = settings.batch_size
        batch = collate([_row(tokens, scored // rows) for _ in range(rows)])
        mixed = dtype is not torch.float32 and cards == 1
        with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else contextlib.nullcontext():
            loss = tuned(**batch, count=scored)
        memory.phase = "loss"
        loss.backward()
        memory.hold([parameter.grad for parameter in trained], "gradients")
        memory.phase = "optimiser step"
        optimiser.step()
    return dict(memory.peaks)


def _row(tokens: int, scored: int) -> dict[str, list[int]]:
    return {
        "input_ids": [0] * tokens,
        "labels": [IGNORED] * (tokens - scored) + [0] * scored,
        "position_ids": list(range(tokens)),
        "branches": [1] * tokens,
    }


def _watch_layers(tuned: torch.nn.Module, memory: LiveMemory, trained: list[torch.nn.Parameter]) -> None:
    """Name the phases of the backward pass by the layer that gradients pass through."""
    layers = [module for module in tuned.modules() if type(module).__name__.endswith("DecoderLayer")]
    phases = {id(layer): backward(place) for place, layer in enumerate(reversed(layers))}

    def watch(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output

        def enter(gradient: Any) -> None:
            memory.hold([parameter.grad for parameter in trained if parameter.grad is not None], "gradients")
            memory.phase = phases[id(layer)]

        if states.requires_grad:
            states.register_hook(enter)

    for layer in layers:
        layer.register_forward_hook(watch)


def _pack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace linear layers by those of bitsandbytes, as ``models.load_in_4_bits`` loads them."""
    from bitsandbytes.nn import modules

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            with torch.device("meta"):
                packed = modules.Linear4bit(  # type: ignore[no-untyped-call]
                    layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
                )
            model.set_submodule(name, packed)
    vars(model)["is_loaded_in_4bit"] = True


def _scales(tuned: torch.nn.Module, dtype: torch.dtype, memory: LiveMemory) -> list[torch.Tensor]:
    """Give packed layers the scales of their weights, themselves in 8 bits; returns them."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit

    scales: list[torch.Tensor] = []
    with memory.mode:
        for layer in tuned.modules():
            if isinstance(layer, Linear4bit):
                size = layer.in_features * layer.out_features
                blocks = size // NF4_BLOCK
                packed = torch.empty(size // 2, 1, dtype=torch.uint8)
                layer.weight = torch.nn.Parameter(packed, requires_grad=False)
                first, second = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // SCALE_BLOCK))
                codes = [torch.empty(256), torch.empty(16), torch.empty(())]
                nested = QuantState(  # type: ignore[no-untyped-call]
                    second, code=codes[0], blocksize=SCALE_BLOCK, dtype=torch.float32
                )
                shape = torch.Size((layer.out_features, layer.in_features))
                vars(layer.weight)["quant_state"] = QuantState(  # type: ignore[no-untyped-call]
                    first, shape, codes[1], NF4_BLOCK, "nf4", dtype, offset=codes[2], state2=nested
                )
                scales += [first, second, *codes]
    return scales


@contextlib.contextmanager
def _process_group(cards: int) -> Iterator[None]:
    """A process group of so many cards, of which this process is the first and the others do not exist."""
    if cards == 1:
        yield
        return
    import torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=cards, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _shard(tuned: Any, checkpointing: bool) -> Any:
    """Shard a model as the Trainer does with ``sharding = "fsdp"``: with accelerate's own functions."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy="bf16",
        cpu_ram_efficient_loading=False,
        activation_checkpointing=checkpointing,
    )
    plugin.set_auto_wrap_policy(tuned)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=False, device="cpu"
    )
    if checkpointing:
        tuned = fsdp2_apply_ac(accelerator, tuned)
    return fsdp2_prepare_model(accelerator, tuned)
