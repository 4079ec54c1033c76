"""The loss in training and validation: cross-entropy over the completion tokens of packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stepladder.training.sequences import IGNORED, Pack

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stepladder.training.data import Watch


def collate(packs: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of packs, padded on the right; padding is a branch of its own, -1. Shapes (packs, longest)."""
    import torch

    width = max(len(p["input_ids"]) for p in packs)
    fill = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "branches": -1}
    return {key: torch.tensor([p[key] + [value] * (width - len(p[key])) for p in packs]) for key, value in fill.items()}


def completion_loss(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of the completion tokens of a collated batch, summed and divided by ``count``, by default their
    number. Logits are computed for these tokens only: with a small model they are most of the work of a step."""
    labels, branches = batch["labels"][:, 1:], batch["branches"]
    scored = labels != IGNORED
    is_visible = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    hidden = model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=is_visible.tril()[:, None],  # (packs, 1, queries, keys)
        use_cache=False,
    ).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden[scored]).float()  # type: ignore[no-untyped-call]
    return token_loss(logits, labels[scored]) / (scored.sum() if count is None else count)


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of tokens; shapes (tokens, words) and (tokens,)."""
    import torch

    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def score_completions(model: PreTrainedModel) -> None:
    """Make a call of the model with a collated batch return its :func:`completion_loss`. Wrappers for several devices
    hook into calls of the model, so the loss must be computed inside one."""
    original_forward = model.forward

    def forward(*args: Any, branches: torch.Tensor | None = None, count: Any = None, **inputs: Any) -> Any:
        if branches is None:
            return original_forward(*args, **inputs)
        return completion_loss(model, {"branches": branches, **inputs}, count)

    model.forward = forward


def validation_loss(model: Any, packs: Sequence[Pack], batch_size: int, watch: Watch = lambda *_: None) -> float:
    """Mean cross-entropy of the completion tokens of packs, in nats per token. The model must be one that
    :func:`score_completions` has changed. ``watch`` is called with (packs done, all packs) after each batch."""
    import torch

    was_training = model.training
    model.train(False)
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(packs), batch_size):
            batch = {
                key: rows.to(device)
                for key, rows in collate([p._asdict() for p in packs[start : start + batch_size]]).items()
            }
            scored = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch, count=1))
            count += scored
            watch(min(start + batch_size, len(packs)), len(packs))
    model.train(was_training)
    return total / max(1, count)
