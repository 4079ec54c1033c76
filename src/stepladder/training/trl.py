"""LoRA fine-tuning with TRL and PEFT, in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stepladder import models, template
from stepladder.config import Train
from stepladder.records import Example
from stepladder.training.packing import IGNORED, Batched, pack, tokenise

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

Report = Callable[[int, int, float], None]
"""Called with (optimiser steps done, steps in all, last loss)."""


def train(settings: Train, seed: int, base: Path, examples: Sequence[Example], folder: Path, report: Report) -> None:
    """Fine-tune a LoRA adapter on all linear layers and write it, with its log, into ``folder``.

    Only completion tokens carry loss. Examples that share a beginning are packed (training/packing.py). The adapter is
    a standard PEFT folder; ``log.jsonl`` has one line per optimiser step: step, epoch, loss, learning_rate, tokens
    (computed so far).
    """
    models.require("datasets", "peft", "trl")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed
    from trl import SFTConfig, SFTTrainer

    tokenizer = models.load_tokenizer(base)
    dtype = models.compute_dtype()
    rows = tokenise(tokenizer, examples, settings.max_length)
    packs = pack(rows, settings.max_length)
    data = Dataset.from_list([p._asdict() for p in packs])
    steps = math.ceil(len(packs) / (settings.batch_size * settings.gradient_accumulation)) * settings.epochs
    log: list[dict[str, Any]] = []

    class Log(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(
            self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                log.append(
                    {
                        "step": state.global_step,
                        "epoch": round(float(state.epoch or 0), 4),
                        "loss": round(float(logs["loss"]), 5),
                        "learning_rate": float(logs["learning_rate"]),
                        "tokens": int(state.num_input_tokens_seen),
                    }
                )
                report(state.global_step, state.max_steps, float(logs["loss"]))

    class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Batched([len(p.input_ids) for p in packs], settings.batch_size, seed)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return completion_loss(model.get_base_model(), inputs, num_items_in_batch)

    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        # On a card memory is the limit and recomputing is cheap; on a CPU it is the other way round.
        gradient_checkpointing=cuda,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        bf16=dtype is torch.bfloat16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        include_num_input_tokens_seen=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # The adapter's random initialisation happens while the trainer is built, before the trainer seeds anything.
    set_seed(seed)
    trainer = Trainer(
        model=models.load(base, dtype),
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Log()],
    )
    # The Trainer prints a summary dictionary of its own; the live view already says it.
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tuned = cast("PeftModel", trainer.model)
    lora = cast("LoraConfig", tuned.peft_config["default"])
    lora.base_model_name_or_path = base.name  # a name, not a path of this machine
    lora.target_modules = sorted(lora.target_modules or ())  # a set: its order would differ from process to process
    tuned.save_pretrained(str(folder))
    # PEFT's model card is an empty form that names folders of this machine.
    (folder / "README.md").unlink(missing_ok=True)
    template.write(tokenizer, folder)
    with (folder / "log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in log)


def collate(packs: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Packs side by side, padded on the right with a branch that nobody else sees; shapes (packs, longest)."""
    import torch

    width = max(len(p["input_ids"]) for p in packs)
    fill = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "branches": -1}
    return {key: torch.tensor([p[key] + [value] * (width - len(p[key])) for p in packs]) for key, value in fill.items()}


def completion_loss(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of the completion tokens of a collated batch, summed and divided by ``count``, by default their
    number. Only their positions are scored: with a small model the vocabulary is most of a step."""
    import torch

    labels, branches = batch["labels"][:, 1:], batch["branches"]
    scored = labels != IGNORED
    sees = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    hidden = model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=sees.tril()[:, None],  # (packs, 1, queries, keys)
        use_cache=False,
    ).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden[scored]).float()  # type: ignore[no-untyped-call]
    loss = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")
    return loss / (scored.sum() if count is None else count)


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Fold an adapter into its base, in the base's own dtype, and write an ordinary model folder."""
    models.require("peft")
    from peft import PeftModel

    tokenizer = models.load_tokenizer(base)
    template.check(tokenizer, adapter)
    model = PeftModel.from_pretrained(models.load(base, _own_dtype(base)), adapter)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config._name_or_path = ""
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)


def _own_dtype(folder: Path) -> Any:
    models.require()
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
