"""Repairs of a quantised model that lost too much: 8 bits for its worst layers, or a short recovery tuning."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder import models
from stepladder.config import Dtype
from stepladder.models.layerwise import Layerwise, scored_log_probabilities
from stepladder.models.weight_files import WeightFiles
from stepladder.quantising.gptq import linears
from stepladder.training.sequences import TokenRow

if TYPE_CHECKING:
    import torch

MAX_SHARE_IN_8_BITS = 0.1
"""Of the quantised weights."""
RECOVERY_LEARNING_RATE = 3e-4
"""Of AdamW."""
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers compute as one, and that therefore need the same number of bits."""


def worst_layers(merged: Path, quantised: Path, rows: Sequence[list[int]], dtype: Dtype = "auto") -> list[str]:
    """Names of the layers whose output suffered most, up to :data:`MAX_SHARE_IN_8_BITS` of all weights.

    The error of a layer is the mean square change of its output relative to the output's own, with inputs taken as
    uncorrelated: sum E[x_j^2] (w_ij - q_ij)^2 / sum E[x_j^2] w_ij^2, with E[x_j^2] measured on ``rows`` of token ids.
    One layer at a time is in memory.
    """
    energies = _energies(merged, rows, dtype)
    weights, quantised_weights, computed_in = WeightFiles(merged), WeightFiles(quantised), models.compute_dtype(dtype)
    errors: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    members: dict[str, list[str]] = {}
    for name, energy in energies.items():
        weight = weights.read(f"{name}.weight", computed_in).float()
        change = weight - quantised_weights.read(f"{name}.weight", computed_in).float()
        group = _fused_name(name)
        sums = errors.setdefault(group, [0.0, 0.0])
        sums[0] += float((energy * change**2).sum())
        sums[1] += float((energy * weight**2).sum())
        sizes[group] = sizes.get(group, 0) + weight.numel()
        members.setdefault(group, []).append(name)
    budget = MAX_SHARE_IN_8_BITS * sum(sizes.values())
    chosen: list[str] = []
    for group in sorted(errors, key=lambda g: -errors[g][0] / max(errors[g][1], 1e-30)):
        if sizes[group] <= budget or not chosen:
            budget -= sizes[group]
            chosen += members[group]
    return sorted(chosen)


def _fused_name(name: str) -> str:
    """A layer's name; the same for all layers that servers fuse into one."""
    for fused in _FUSED:
        name = re.sub(rf"\b({'|'.join(fused)})$", "+".join(fused), name)
    return name


def _energies(folder: Path, rows: Sequence[list[int]], dtype: Dtype) -> dict[str, torch.Tensor]:
    """Mean square of each input of each quantised layer over ``rows``; by layer, shape (inputs,)."""
    import torch

    model = Layerwise(folder, dtype)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().float().flatten(0, -2).square().mean(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        layer.register_forward_pre_hook(hook)

    for name, layer in linears(model.model).items():
        watch(name, layer)
    model.hidden_states(rows)
    return {name: (total / len(rows)).cpu() for name, total in sums.items()}


def recover(merged: Path, quantised: Path, rows: Sequence[TokenRow], dtype: Dtype = "auto") -> None:
    """Tune the norms of a quantised model, in place, towards the merged model's next-token distributions: one pass over
    ``rows``, with the KL divergence at their completion tokens as loss. Quantised weights do not change.

    The norms' master copies and the optimiser's state are float32. The loss of each step is computed with the norms
    rounded to the format they are stored in, so that what is tuned is what is written. After Li et al. 2023, Norm
    Tweaking, arXiv:2309.02784.

    In memory are the quantised model, unpacked, since gradients go through all of it, with the activations of one layer
    for one row; of the merged model the head, and the last hidden states of all rows.
    """
    models.require()
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    teacher = Layerwise(merged, dtype)
    hidden = teacher.hidden_states([row.ids for row in rows])
    student = models.load(quantised, dtype)
    student.train(False)
    student.requires_grad_(False)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in student.base_model.layers:  # type: ignore[union-attr]
        layer.training = True  # without which it is not checkpointed; the modules in it still do not drop anything out
    tuned = {name: weight for name, weight in student.named_parameters() if name.endswith("norm.weight")}
    stored = _stored_as(quantised, tuned)
    masters = {name: weight.detach().float().clone().requires_grad_(True) for name, weight in tuned.items()}
    for weight in tuned.values():
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(masters.values(), lr=RECOVERY_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(rows))
    for row, teacher_log_probs in zip(
        rows, teacher.log_probabilities(hidden, [row.scored for row in rows]), strict=True
    ):
        ids = torch.tensor([row.ids], device=student.device)
        student_log_probs = scored_log_probabilities(student, row.scored, input_ids=ids)
        loss = torch.nn.functional.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, weight in tuned.items():
            masters[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in tuned.items():
                weight.copy_(masters[name].to(stored[name]))
    for shard in sorted(quantised.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in tensors.keys() & tuned.keys():
            tensors[name] = tuned[name].detach().to("cpu", stored[name])
        save_file(tensors, shard, metadata=metadata)


def _stored_as(folder: Path, names: Collection[str]) -> dict[str, torch.dtype]:
    """The number formats of tensors in a folder's files, by name."""
    from safetensors import safe_open

    dtypes: dict[str, torch.dtype] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            dtypes |= {name: file.get_tensor(name).dtype for name in file.keys() if name in names}  # noqa: SIM118
    return dtypes
