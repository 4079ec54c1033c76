"""Weights and optimiser state that are split over several devices: how they are loaded, saved and gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stepladder import models
from stepladder.config import Train
from stepladder.models.loading import loading, set_weight
from stepladder.models.weight_files import WeightFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerCallback
    from trl import SFTTrainer


def sharding(settings: Train, checkpointing: bool) -> dict[str, Any]:
    """The Trainer's arguments for sharding weights and optimiser over devices; ``checkpointing``: of activations."""
    if settings.sharding == "fsdp":
        config = {
            "version": 2,
            "activation_checkpointing": checkpointing,
            "state_dict_type": "SHARDED_STATE_DICT",  # every process writes its share of adapter and optimiser
        }
        return {"fsdp": True, "fsdp_config": config}
    if settings.sharding == "zero3":
        stage = {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True}
        auto = (
            "gradient_accumulation_steps",
            "gradient_clipping",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
        )
        return {"deepspeed": {"zero_optimization": stage, "bf16": {"enabled": "auto"}} | dict.fromkeys(auto, "auto")}
    return {}


@contextlib.contextmanager
def sharded_on_cpus(settings: Train) -> Iterator[None]:
    """CPU processes that share weights as cards do, where a trainer is made inside the block. accelerate shards on
    cards only; CPU processes would all hold everything (DDP), without a word."""
    if settings.sharding != "fsdp" or models.has_cuda():
        yield
        return
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState._shared_state
    state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        state["distributed_type"] = DistributedType.MULTI_CPU


def load_on_numbered_cpus() -> None:
    """Let checkpoints be loaded by CPU processes that train together: their device is ``cpu:0``, a name that PyTorch
    takes for a device but not for a place to load to."""
    import torch

    def load(storage: Any, place: str) -> Any:
        return storage if place.startswith("cpu:") else None

    torch.serialization.register_package(0, lambda _: None, load)


def student(settings: Train, base: Path) -> PreTrainedModel:
    """The base to train an adapter on. With FSDP its weights are placeholders that take no memory: PEFT must see them
    on a device, so that the adapter is initialised as on an ordinary base. :func:`share_reader` gives it weights."""
    if settings.qlora:
        return models.load_in_4_bits(base, settings.dtype)
    if settings.sharding != "fsdp":
        return models.load(base, settings.dtype, move=settings.sharding == "none")
    import torch

    model = models.skeleton(base, settings.dtype)
    for name, weight in [*model.named_parameters()]:
        set_weight(model, name, torch.zeros(1, dtype=weight.dtype).expand(weight.shape))
    model.tie_weights()
    return model


def share_reader(model: torch.nn.Module, base: Path) -> TrainerCallback:
    """Prepare a model with the placeholders of :func:`student` for FSDP, and return the callback that gives every
    process its share of the weights once they are split, before the first step: read from the files, one tensor at a
    time, so that no process ever holds the whole base, and its files are read from the disk once."""
    import torch
    from transformers import TrainerCallback

    for name, weight in [*model.named_parameters()]:
        if not weight.requires_grad:
            set_weight(model, name, weight.to("meta"))
    cast("PreTrainedModel", model).tie_weights()

    class ShareReader(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with loading("model", base), torch.no_grad():
                read_shares(model, WeightFiles(base))

    return ShareReader()


def read_shares(model: torch.nn.Module, files: WeightFiles) -> None:
    """Give the sharded parameters of a model that have no memory yet this process's rows of the files' weights.

    Raises:
        ModelError: a tensor is missing.
        ValueError: one has another shape than its parameter.
    """
    import torch
    from torch.distributed.tensor import DTensor

    shares: dict[int, torch.nn.Parameter] = {}  # by parameter: a tied one has two names
    state = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if not parameter.is_meta:
            continue
        if id(parameter) not in shares:
            stored = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            whole, mesh = files.read(stored), parameter.device_mesh
            if whole.shape != parameter.shape:
                raise ValueError(f"tensor {stored} has shape {tuple(whole.shape)}, not {tuple(parameter.shape)}")
            rows = whole.chunk(mesh.size())[mesh.get_local_rank() :][:1] or (whole[:0],)
            local = rows[0].to(mesh.device_type, parameter.dtype, copy=True)
            share = DTensor.from_local(
                local, mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            shares[id(parameter)] = torch.nn.Parameter(share, requires_grad=False)
        state[name] = shares[id(parameter)]
    model.load_state_dict(state, strict=False, assign=True)


def gather(trainer: SFTTrainer, settings: Train) -> dict[str, Any] | None:
    """The trained weights where they are sharded over devices, which all processes must call this for; else None."""
    if settings.sharding == "zero3":
        return cast("dict[str, Any]", trainer.accelerator.get_state_dict(trainer.model_wrapped))
    if settings.sharding == "none":
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapter_only = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(trainer.model_wrapped, options=adapter_only)
