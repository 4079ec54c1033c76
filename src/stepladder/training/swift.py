"""LoRA fine-tuning with ms-swift, the winning entry's trainer, as a subprocess in an environment of its own.

Its requirements conflict with Stepladder's (constraints/swift.txt), so it gets a file of conversations and returns a
PEFT adapter. Before training, its rendering of a conversation must match Stepladder's token for token.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import models
from stepladder.config import Swift, Train
from stepladder.errors import UserError
from stepladder.models import template
from stepladder.models.files import refuse_code
from stepladder.records import Example
from stepladder.supervise import child_environment, supervised
from stepladder.training.data import (
    MAX_LOG_CHARACTERS,
    Data,
    Report,
    last_complete_checkpoint,
    log_tail,
    scheduler,
    uses_checkpointing,
)
from stepladder.training.merging import refuse_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Without these variables ms-swift asks the hub at start, and waits through retries where there is no network."""

_RENDER = """
import json, sys
from swift import get_processor, get_template
base, kind, name, row = sys.argv[1:]
template = get_template(get_processor(base, model_type=kind or None), template_type=name or None)
template.set_mode("train")
encoded = template.encode(json.loads(row))
print(json.dumps([encoded["input_ids"], encoded["labels"]]))
"""


def train(settings: Train, seed: int, base: Path, data: Data, folder: Path, scratch: Path, report: Report) -> None:
    """Train as :func:`stepladder.training.trl.train`, but by ms-swift: no packing, full logits, no validation loss.

    Raises:
        UserError: the environment does not exist, or ms-swift failed; the message holds the end of its log.
        TemplateError: it renders conversations differently.
    """
    check(settings, base, data.examples[0])
    tokenizer, rows = models.load_tokenizer(base), scratch / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for example in data.examples:
            file.write(_row(tokenizer, example) + "\n")
    out = scratch / "swift"
    command = sft(settings, seed, base, rows, out, models.dtype_name(settings.dtype), cuda=models.has_cuda())
    if (resumed := last_complete_checkpoint(out)) is not None:
        command += ["--resume_from_checkpoint", str(resumed)]
    device_variables = {} if settings.devices == 1 else {"NPROC_PER_NODE": str(settings.devices)}
    _run(settings.swift, command, scratch / "swift.log", out / "logging.jsonl", report, device_variables)
    trained = last_complete_checkpoint(out)
    if trained is None:
        raise UserError(f"ms-swift ended without a checkpoint; see {scratch / 'swift.log'}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, folder / name)
    _remove_local_paths(folder / "adapter_config.json", base)
    template.write(tokenizer, folder)
    with (folder / "log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in _read_log(out / "logging.jsonl"))


def _row(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """A conversation as ms-swift reads it, which renders it itself: control tokens in its messages are broken up."""
    chat = [message.model_dump() for message in template.as_text(tokenizer, example.messages)]
    return json.dumps({"messages": chat}, ensure_ascii=False)


def sft(settings: Train, seed: int, base: Path, rows: Path, out: Path, dtype: str, *, cuda: bool) -> list[str]:
    """The arguments of ``swift sft`` for a configuration; ``dtype`` is its number format on this machine."""
    flags: dict[str, Any] = {
        "model": base,
        **_model_flags(settings.swift),
        "tuner_type": "lora",
        "dataset": rows,
        "split_dataset_ratio": 0,
        "target_modules": "all-linear",
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": scheduler(settings),
        "warmup_ratio": settings.warmup,
        "adam_beta2": settings.adam_beta2,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation // settings.devices,
        "gradient_checkpointing": uses_checkpointing(settings, cuda=cuda),
        "max_length": settings.max_length,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "seed": seed,
        "data_seed": seed,
        "output_dir": out,
        "add_version": False,
        "report_to": "none",
        "check_model": False,
        **{"none": {}, "fsdp": {"fsdp": "fsdp2"}, "zero3": {"deepspeed": "zero3"}}[settings.sharding],
        **({"quant_method": "bnb", "quant_bits": 4} if settings.qlora else {}),
        "torch_dtype": dtype,
        **({} if dtype == "bfloat16" else {"fp16": False, "bf16": False}),  # float32 would silently become float16
        **({} if cuda else {"use_cpu": True}),
    }
    return ["sft", *_command_line(flags)]


def merge(settings: Train, base: Path, adapter: Path, folder: Path) -> None:
    """Merge as :func:`stepladder.training.merging.merge`, but by ms-swift.

    Raises:
        UserError: the environment does not exist, or ms-swift failed; the message holds the end of its log.
        TemplateError: the adapter was trained with another chat template.
    """
    refuse_code(base, "ms-swift")
    refuse_quantised(base)
    tokenizer = models.load_tokenizer(base)
    template.check(tokenizer, adapter)
    out = folder / "swift"  # ms-swift makes it; it must not exist
    log = folder / "swift.log"
    _run(settings.swift, export(settings, base, adapter, out), log, out / "logging.jsonl", lambda *_: None, {})
    for path in out.iterdir():
        if path.name != "args.json":  # which names folders of this machine
            path.rename(folder / path.name)
    shutil.rmtree(out)
    log.unlink()
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)


def export(settings: Train, base: Path, adapter: Path, out: Path) -> list[str]:
    """The arguments of ``swift export`` that merge an adapter into its base, in the base's own dtype."""
    flags = {
        "model": base,
        **_model_flags(settings.swift),
        "adapters": adapter,
        "merge_lora": True,
        "torch_dtype": str(models.own_dtype(base)).removeprefix("torch."),
        "output_dir": out,
    }
    return ["export", *_command_line(flags)]


def check(settings: Train, base: Path, example: Example) -> None:
    """Compare ms-swift's rendering of a conversation with Stepladder's.

    The newline after the closing token, which ChatML templates write but a student never generates, is ignored.

    Raises:
        TemplateError: naming the first token that differs.
        UserError: ms-swift cannot render it, or the base's folder brings code.
    """
    refuse_code(base, "ms-swift")
    swift = settings.swift
    tokenizer = models.load_tokenizer(base)
    prompt, completion = template.conversation_tokens(tokenizer, example.messages)
    settings_of_swift = [swift.model_type or "", swift.template or ""]
    arguments = [python(swift.environment), "-c", _RENDER, base, *settings_of_swift, _row(tokenizer, example)]
    done = subprocess.run(  # noqa: S603
        [str(word) for word in arguments],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment() | OFFLINE,
    )
    if done.returncode:
        raise UserError(
            f"ms-swift cannot render a conversation with {base}: {done.stderr.strip()[-MAX_LOG_CHARACTERS:]}"
        )
    ids, labels = json.loads(done.stdout.strip().splitlines()[-1])
    template.check_same(tokenizer, "prompt", prompt, ids[: labels.count(-100)], "ms-swift")
    answer = ids[labels.count(-100) :][: len(completion)]
    template.check_same(tokenizer, "completion", completion, answer, "ms-swift")


def _model_flags(swift: Swift) -> dict[str, str]:
    flags = {"model_type": swift.model_type, "template": swift.template}
    return {name: value for name, value in flags.items() if value is not None}


def python(environment: Path) -> Path:
    """The interpreter of ms-swift's environment.

    Raises:
        UserError: it does not exist.
    """
    interpreter = environment / "bin" / "python"
    if not interpreter.exists():
        raise UserError(f"{environment}: ms-swift's environment does not exist; create it with 'make swift'")
    return interpreter


def _run(
    swift: Swift, command: list[str], log: Path, progress: Path, report: Report, variables: Mapping[str, str]
) -> None:
    """Run ``swift`` to its end and report its progress, which is read from its log.

    Raises:
        UserError: it failed; the message holds the end of its log.
    """
    arguments = [str(python(swift.environment).with_name("swift")), *command]
    with supervised(arguments, log, child_environment() | OFFLINE | dict(variables)) as child:
        reported = 0
        while child.poll() is None:
            time.sleep(0.5)
            rows = _read_log(progress)
            if len(rows) > reported:
                reported = len(rows)
                report(rows[-1]["step"], rows[-1]["steps"], rows[-1]["loss"])
    if child.returncode:
        raise UserError(f"ms-swift ended with code {child.returncode}; {log} ends with: ... {log_tail(log)}")


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The steps in ms-swift's log as rows of ``log.jsonl``, with the total number of steps in ``steps``."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line is still being written
            continue
        if "loss" in entry:
            step, _, steps = entry["global_step/max_steps"].partition("/")
            rows.append(
                {
                    "step": int(step),
                    "steps": int(steps),
                    "epoch": round(float(entry["epoch"]), 4),
                    "loss": round(float(entry["loss"]), 5),
                    "learning_rate": float(entry["learning_rate"]),
                }
            )
    return rows


def _remove_local_paths(path: Path, base: Path) -> None:
    """Replace the base's path by its name, and sort what is a set, so that the file is the same on every machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.name
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _command_line(flags: Mapping[str, object]) -> Iterator[str]:
    """Flags as ms-swift's arguments: booleans are written out."""
    for name, value in flags.items():
        yield from (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
