"""LoRA fine-tuning with TRL and PEFT, in this process."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from stepladder import models, template
from stepladder.config import Train
from stepladder.records import Example

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

Report = Callable[[int, int, float], None]
"""Called with (optimiser steps done, steps in all, last loss)."""


class Row(NamedTuple):
    """A tokenised example: ids of the whole conversation, and how many of them are the prompt's (no loss there)."""

    ids: list[int]
    prompt: int


def tokenise(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Row]:
    """Rows of the examples that fit; one that does not is left out, since a cut chain teaches a cut answer."""
    rows = []
    for example in examples:
        prompt, completion = template.conversation_tokens(tokenizer, example.messages)
        if len(prompt) + len(completion) <= max_length:
            rows.append(Row(prompt + completion, len(prompt)))
    return rows


class Batched:
    """A sampler whose batches hold sequences of like length, in random order.

    Sorting a whole epoch by length, as the Trainer's own strategy does with a few hundred examples, feeds the student
    one kind of question after another; it forgets the first before it has seen the last (EXPERIMENTS.md). Here only
    the examples of eight random batches are sorted, and their batches are shuffled again. Every epoch draws anew.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch}")
        order = draw.sample(range(len(self.lengths)), len(self.lengths))
        window, size = 8 * self.batch_size, self.batch_size
        batches = []
        for at in range(0, len(order), window):
            alike = sorted(order[at : at + window], key=lambda i: self.lengths[i])
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        *full, last = sorted(batches, key=len, reverse=True)  # a short batch anywhere but last would shift the others
        draw.shuffle(full)
        return (i for batch in (*full, last) for i in batch)


def train(settings: Train, seed: int, base: Path, examples: Sequence[Example], folder: Path, report: Report) -> None:
    """Fine-tune a LoRA adapter on all linear layers and write it, with its log, into ``folder``.

    Only completion tokens carry loss. Batches hold sequences of like length. The adapter is a standard PEFT folder;
    ``log.jsonl`` has one line per optimiser step: step, epoch, loss, learning_rate, tokens (trained on so far).
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
    data = Dataset.from_list(
        [{"input_ids": row.ids, "labels": [-100] * row.prompt + row.ids[row.prompt :]} for row in rows]
    )
    steps = math.ceil(len(rows) / (settings.batch_size * settings.gradient_accumulation)) * settings.epochs
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
            return Batched([len(row.ids) for row in rows], settings.batch_size, seed)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The mean cross-entropy of the completion tokens, as in TRL. Off CUDA, TRL scores the prompts' positions
            too and throws them away: a third of a step where the vocabulary is most of a small model."""
            if cuda or return_outputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
            causal = model.get_base_model()
            labels = inputs["labels"][:, 1:]
            scored = labels != -100
            # Padding is on the right, where a causal model's earlier positions cannot see it: no mask is needed.
            hidden = causal.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state[:, :-1]
            logits = causal.get_output_embeddings()(hidden[scored]).float()
            loss = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")
            return loss / (scored.sum() if num_items_in_batch is None else num_items_in_batch)

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
