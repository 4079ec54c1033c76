"""LoRA fine-tuning with TRL and PEFT, in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stepladder import models, template
from stepladder.config import Train
from stepladder.training.data import Data, Report, last_whole
from stepladder.training.packing import IGNORED, Batched, Pack, pack, tokenise

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def train(settings: Train, seed: int, base: Path, data: Data, folder: Path, scratch: Path, report: Report) -> None:
    """Fine-tune a LoRA adapter on all linear layers and write it, with its log, into ``folder``.

    Only completion tokens carry loss. Examples that share a beginning are packed (training/packing.py). The adapter is
    a standard PEFT folder; ``log.jsonl`` has one line per optimiser step (step, epoch, loss, learning_rate, tokens
    computed so far) and after each epoch one with the validation loss. ``scratch`` holds checkpoints; what a killed
    training left there is gone on from: optimiser, schedule, random state and place in the data.
    """
    models.require("datasets", "peft", "trl")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    tokenizer = models.load_tokenizer(base)
    dtype = models.compute_dtype()
    packs, held_out = (
        pack(tokenise(tokenizer, examples, settings.max_length), settings.max_length) for examples in data
    )
    epoch = math.ceil(len(packs) / (settings.batch_size * settings.gradient_accumulation))
    stops_early = settings.patience is not None and bool(held_out)

    class Live(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                report(state.global_step, state.max_steps, float(logs["loss"]))

    class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Batched([len(p.input_ids) for p in packs], settings.batch_size, seed)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return completion_loss(model.get_base_model(), inputs, num_items_in_batch)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            student = cast("PreTrainedModel", cast("PeftModel", self.model).get_base_model())
            metrics = {"eval_loss": validation_loss(student, held_out, settings.batch_size)}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    cuda = models.has_cuda()
    checkpointing = cuda if settings.gradient_checkpointing is None else settings.gradient_checkpointing
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=math.ceil(settings.warmup * epoch * settings.epochs),
        weight_decay=0.0,
        max_grad_norm=settings.clip,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=checkpointing,
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
        # Counted in steps, not epochs, so that a checkpoint of an epoch's last step knows its validation loss.
        eval_strategy="steps" if held_out else "no",
        eval_steps=epoch,
        save_strategy="steps",
        save_steps=epoch if stops_early else settings.save_steps,
        save_total_limit=2,
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if stops_early else None,
        report_to="none",
        disable_tqdm=True,
    )
    # The adapter's random initialisation happens while the trainer is built, before the trainer seeds anything.
    set_seed(seed)
    trainer = Trainer(
        model=models.load(base, dtype),
        args=arguments,
        train_dataset=Dataset.from_list([p._asdict() for p in packs]),
        eval_dataset=Dataset.from_list([p._asdict() for p in held_out]) if held_out else None,
        data_collator=collate,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Live()],
    )
    if stops_early:
        trainer.add_callback(EarlyStoppingCallback(int(settings.patience or 1)))
    # The Trainer prints a summary dictionary of its own; the live view already says it.
    trainer.remove_callback(PrinterCallback)
    resumed = last_whole(scratch)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    tuned = cast("PeftModel", trainer.model)
    lora = cast("LoraConfig", tuned.peft_config["default"])
    lora.base_model_name_or_path = base.name  # a name, not a path of this machine
    lora.target_modules = sorted(lora.target_modules or ())  # a set: its order would differ from process to process
    tuned.save_pretrained(str(folder))
    # PEFT's model card is an empty form that names folders of this machine.
    (folder / "README.md").unlink(missing_ok=True)
    template.write(tokenizer, folder)
    rows = (row for entry in trainer.state.log_history if (row := _logged(entry)))
    with (folder / "log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _logged(entry: dict[str, Any]) -> dict[str, Any] | None:
    """A line of ``log.jsonl`` from one of the trainer's; None for its summary at the end."""
    place = {"step": entry["step"], "epoch": round(float(entry.get("epoch") or 0), 4)}
    if "eval_loss" in entry:
        return place | {"validation_loss": round(float(entry["eval_loss"]), 5)}
    if "loss" not in entry:
        return None
    return place | {
        "loss": round(float(entry["loss"]), 5),
        "learning_rate": float(entry["learning_rate"]),
        "tokens": int(entry["num_input_tokens_seen"]),
    }


def validation_loss(model: PreTrainedModel, packs: Sequence[Pack], batch_size: int) -> float:
    """Mean cross-entropy of the completion tokens of packs nobody trains on, in nats a token."""
    import torch

    was_training = model.training
    model.train(False)
    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(packs), batch_size):
            batch = {
                key: rows.to(model.device)
                for key, rows in collate([p._asdict() for p in packs[at : at + batch_size]]).items()
            }
            scored = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(completion_loss(model, batch, 1))
            count += scored
    model.train(was_training)
    return total / max(1, count)


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
    model = PeftModel.from_pretrained(models.load(base, models.own_dtype(base)), adapter)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config._name_or_path = ""
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)
