"""LoRA fine-tuning with TRL and PEFT, in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from stepladder import models
from stepladder.config import Train
from stepladder.errors import UserError
from stepladder.models import template
from stepladder.training.data import Data, Report, last_complete_checkpoint, scheduler, uses_checkpointing
from stepladder.training.loss import collate, score_completions, validation_loss
from stepladder.training.sequences import LengthGroupedSampler, Pack, blank, pack, singly, tokenise
from stepladder.training.sharding import (
    gather,
    load_on_numbered_cpus,
    sharded_on_cpus,
    sharding,
    share_reader,
    student,
)

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer


ROUNDING = 1e-6
"""Of the Trainer's count of epochs, which is a sum of steps."""


class Plan(NamedTuple):
    """What is trained on and measured, and how often."""

    packs: list[Pack]
    held_out: list[Pack]
    steps_per_epoch: int
    is_measured: bool
    """Whether there is a validation loss or accuracy."""
    stops_early: bool
    metric: Literal["eval_loss", "eval_accuracy"]
    """The metric that early stopping uses."""
    last_step: int | None = None
    """The step to stop after, on the schedule of all; None: all are done."""


def train(settings: Train, seed: int, base: Path, data: Data, folder: Path, scratch: Path, report: Report) -> None:
    """Fine-tune a LoRA adapter on all linear layers and write it, with its log, into ``folder``.

    Only completion tokens carry loss. Examples with a common prefix are packed unless ``packing`` is off
    (training/sequences.py). The adapter is a standard PEFT folder; ``log.jsonl`` has one line per optimiser step (step,
    epoch, loss, learning_rate, tokens computed so far) and one after each epoch with the validation loss, and with the
    validation accuracy where ``data.exam`` measures it. ``scratch`` holds checkpoints; a killed training resumes from
    the last: optimiser, schedule, random state and position in the data.

    Under torchrun every process calls this with the same arguments (training/distributed.py); the first one writes.

    Raises:
        UserError: ``patience`` is set, and there is nothing to measure.
    """
    models.require("datasets", "peft", "trl")
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    tokenizer = models.load_tokenizer(base)
    plan = _plan(settings, data, tokenizer)
    arguments = _arguments(settings, seed, plan, scratch)
    # The adapter's random initialisation happens while the trainer is built, before the trainer seeds anything.
    set_seed(seed)
    with sharded_on_cpus(settings):
        trainer = _trainer(settings, seed, base, data, plan, arguments, tokenizer, report)
    if settings.sharding != "zero3":  # which keeps float32 copies in its optimiser
        train_in_float32(cast("PeftModel", trainer.model))
    if settings.sharding == "fsdp":
        trainer.add_callback(share_reader(cast("PeftModel", trainer.model), base))
    trainer.add_callback(_progress_callback(report, tensorboard_writer(settings, scratch)))
    if plan.stops_early:
        trainer.add_callback(EarlyStoppingCallback(int(settings.patience or 1)))
    # It prints a summary that the live view already shows.
    trainer.remove_callback(PrinterCallback)
    if settings.devices > 1:
        load_on_numbered_cpus()
    resumed = last_complete_checkpoint(scratch)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    gathered = gather(trainer, settings)
    if trainer.is_world_process_zero():
        _write(trainer, gathered, base, folder)
        template.write(tokenizer, folder)


def _plan(settings: Train, data: Data, tokenizer: PreTrainedTokenizerBase) -> Plan:
    rows, held_out_rows = (
        tokenise(tokenizer, examples, settings.max_length) for examples in (data.examples, data.held_out)
    )
    packs = pack(rows, settings.max_length) if settings.packing else singly(rows)
    held_out = pack(held_out_rows, settings.max_length)
    is_measured = data.exam is not None or bool(held_out)
    if settings.patience is not None and not is_measured:
        raise UserError(
            f"[train] patience = {settings.patience} has no validation loss to go by: no validation question has a "
            f"right chain of at most max_length = {settings.max_length} tokens; set metric = 'accuracy' or no patience"
        )
    steps_per_epoch = math.ceil(len(packs) / (settings.batch_size * settings.gradient_accumulation))
    return Plan(
        packs,
        held_out,
        steps_per_epoch=steps_per_epoch,
        is_measured=is_measured,
        stops_early=settings.patience is not None,
        metric="eval_accuracy" if data.exam is not None else "eval_loss",
        last_step=None if data.last_epoch is None else data.last_epoch * steps_per_epoch,
    )


def _arguments(settings: Train, seed: int, plan: Plan, scratch: Path) -> SFTConfig:
    import torch
    from trl import SFTConfig

    cuda = models.has_cuda()
    checkpointing = uses_checkpointing(settings, cuda=cuda)
    return SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        max_steps=-1 if plan.last_step is None else plan.last_step,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=scheduler(settings),
        warmup_steps=math.ceil(settings.warmup * plan.steps_per_epoch * settings.epochs),
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation // settings.devices,
        gradient_checkpointing=checkpointing and settings.sharding != "fsdp",
        ddp_backend=("nccl" if cuda else "gloo") if settings.devices > 1 else None,
        ddp_find_unused_parameters=False if settings.devices > 1 else None,
        # Else FSDP keeps the whole gradients of every process, in 16 bits, until the last batch of a step.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        if settings.sharding == "fsdp"
        else None,
        **sharding(settings, checkpointing),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        bf16=models.compute_dtype(settings.dtype) is torch.bfloat16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        include_num_input_tokens_seen=True,
        # Counted in steps, not epochs, so that a checkpoint of an epoch's last step knows its validation loss.
        eval_strategy="steps" if plan.is_measured else "no",
        eval_steps=plan.steps_per_epoch,
        save_strategy="steps",
        save_steps=plan.steps_per_epoch if plan.stops_early else settings.save_steps,
        save_total_limit=2,
        load_best_model_at_end=plan.stops_early,
        metric_for_best_model=plan.metric if plan.stops_early else None,
        greater_is_better=plan.metric == "eval_accuracy" if plan.stops_early else None,
        report_to="none",
        disable_tqdm=True,
    )


def _all_steps(settings: Train, plan: Plan) -> int:
    """Optimiser steps of all epochs, from which the schedule of the learning rate is made."""
    return math.ceil(settings.epochs * plan.steps_per_epoch)


def _trainer(
    settings: Train,
    seed: int,
    base: Path,
    data: Data,
    plan: Plan,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
) -> SFTTrainer:
    """TRL's trainer with the sampler, loss and validation of this package."""
    from datasets import Dataset
    from peft.helpers import disable_input_dtype_casting
    from trl import SFTTrainer

    lengths = [len(pack_.input_ids) for pack_ in plan.packs]
    sampler = LengthGroupedSampler(lengths, settings.batch_size, seed, settings.devices)

    class Trainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return sampler

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            steps = num_training_steps if plan.last_step is None else _all_steps(settings, plan)
            return super().create_scheduler(steps, optimizer)

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            # Autocast casts an adapter's input to 16 bits, so PEFT need not cast it to float32 first.
            with disable_input_dtype_casting(cast("PeftModel", self.model)):
                return cast("torch.Tensor", super().training_step(*arguments, **options))  # type: ignore[no-untyped-call, unused-ignore]

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # The count is of the tokens of all devices, but gradients are averaged over devices.
            return model(**inputs, count=num_items_in_batch) * self.accelerator.num_processes

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            def watch(done: int, total: int) -> None:
                report(self.state.global_step, self.state.max_steps, f"validation, {done} of {total}", None)

            metrics = {}
            if plan.held_out:
                metrics["eval_loss"] = validation_loss(self.model_wrapped, plan.held_out, settings.batch_size, watch)
            if data.exam is not None:
                student = cast("PreTrainedModel", cast("PeftModel", self.model).get_base_model())
                student.train(False)
                metrics["eval_accuracy"] = data.exam(tokenizer, student, watch)
                student.train()
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    model = student(settings, base)
    score_completions(model)
    measured = [pack_._asdict() for pack_ in (plan.held_out or plan.packs[:1])]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([pack_._asdict() for pack_ in (*plan.packs, blank())]),
        eval_dataset=Dataset.from_list(measured) if plan.is_measured else None,
        data_collator=collate,
        processing_class=tokenizer,
        peft_config=lora(settings),
    )
    trainer.add_callback(_epoch_callback(sampler))
    return trainer


def lora(settings: Train) -> LoraConfig:
    """The adapter: on all linear layers but the head."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _epoch_callback(sampler: LengthGroupedSampler) -> TrainerCallback:
    """A callback that tells the sampler which epoch begins: accelerate does not, where several devices go on from a
    checkpoint within an epoch."""
    from transformers import TrainerCallback

    class EpochCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sampler.set_epoch(math.floor(state.epoch + ROUNDING))

    return EpochCallback()


def _progress_callback(report: Report, writer: Any) -> TrainerCallback:
    """A callback that passes every logged step to ``report``, and to ``writer``, a TensorBoard writer or None."""
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                loss = float(logs["loss"])
                report(state.global_step, state.max_steps, f"loss {loss:.3f}", loss)
            if writer is not None and state.is_world_process_zero:
                for name, value in (logs or {}).items():
                    writer.add_scalar(name, value, state.global_step)

    return ProgressCallback()


def _write(trainer: SFTTrainer, gathered: dict[str, Any] | None, base: Path, folder: Path) -> None:
    """Write the adapter and the log. ``gathered`` are the weights where they are sharded over devices, else None."""
    tuned = cast("PeftModel", trainer.model)
    lora = cast("LoraConfig", tuned.peft_config["default"])
    lora.base_model_name_or_path = base.name  # a name, not a path of this machine
    lora.target_modules = sorted(lora.target_modules or ())  # a set: its order would differ from process to process
    tuned.save_pretrained(str(folder), state_dict=gathered)
    # PEFT's model card is an empty form that names folders of this machine.
    (folder / "README.md").unlink(missing_ok=True)
    rows = (line for entry in trainer.state.log_history if (line := _log_row(entry)))
    with (folder / "log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in rows)


def train_in_float32(model: torch.nn.Module) -> None:
    """Convert the trained parameters to float32. TRL keeps adapters of a quantised base in bfloat16, where an update
    smaller than half a unit in the last place is rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def tensorboard_writer(settings: Train, scratch: Path) -> Any:
    """The TensorBoard writer for this member's curves; None if it is off."""
    if settings.tensorboard is None:
        return None
    models.require("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    name = scratch.name.removeprefix(".").removesuffix(".scratch")
    return SummaryWriter(str(settings.tensorboard / name))


def _log_row(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The row of ``log.jsonl`` for an entry of the trainer's log; None for the summary at the end."""
    position = {"step": entry["step"], "epoch": round(float(entry.get("epoch") or 0), 4)}
    validation = {name: entry[f"eval_{name}"] for name in ("loss", "accuracy") if f"eval_{name}" in entry}
    if validation:
        return position | {f"validation_{name}": round(float(value), 5) for name, value in validation.items()}
    if "loss" not in entry:
        return None
    return position | {
        "loss": round(float(entry["loss"]), 5),
        "learning_rate": float(entry["learning_rate"]),
        "tokens": int(entry["num_input_tokens_seen"]),
    }
