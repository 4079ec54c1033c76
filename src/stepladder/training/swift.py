"""LoRA fine-tuning with ms-swift, the winning entry's trainer, as a subprocess in an environment of its own.

Its requirements conflict with Stepladder's (constraints/swift.txt), so it gets a file of conversations and returns a
PEFT adapter. Before training, its rendering of a conversation must match Stepladder's token for token.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import models
from stepladder.config import Swift, Train
from stepladder.errors import UserError
from stepladder.models import template
from stepladder.models.files import refuse_code
from stepladder.nodes import Ended
from stepladder.nodes.gang import Gang, Meeting
from stepladder.records import Example
from stepladder.supervise import child_environment, run_watched
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


def train(
    settings: Train,
    seed: int,
    base: Path,
    data: Data,
    folder: Path,
    scratch: Path,
    report: Report,
    gang: Gang | None = None,
) -> None:
    """Train as :func:`stepladder.training.trl.train`, but by ms-swift: no packing, full logits, no validation loss. On
    the nodes of a gang as :func:`stepladder.training.distributed.train`.

    Raises:
        UserError: the environment does not exist, or ms-swift failed; the message holds the end of its log.
        TemplateError: it renders conversations differently.
    """
    check(settings, base, data.examples[0])
    tokenizer, rows = models.load_tokenizer(base), scratch / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for example in data.examples:
            file.write(_row(tokenizer, example) + "\n")
    out, log = scratch / "swift", scratch / "swift.log"
    has_cards = models.has_cuda() if gang is None else gang.has_cards
    command = sft(
        settings,
        seed,
        base.absolute(),
        rows.absolute(),
        out.absolute(),
        models.dtype_name(settings.dtype),
        cuda=has_cards,
    )
    progress = _Progress(out / "logging.jsonl", report)

    def attempt() -> Ended:
        progress.reset()
        resumed = last_complete_checkpoint(out)
        words = command if resumed is None else [*command, "--resume_from_checkpoint", str(resumed.absolute())]
        if gang is None:
            variables = {} if settings.devices == 1 else {"NPROC_PER_NODE": str(settings.devices)}
            return _run_here(settings.swift, words, log, variables, progress.read)
        return _run_gang(gang, settings, words, log, progress)

    ended = attempt() if gang is None else gang.persist(attempt, progress.step, lambda: log_tail(log))
    _check_ended(ended, log)
    trained = last_complete_checkpoint(out)
    if trained is None:
        raise UserError(f"ms-swift ended without a checkpoint; see {log}")
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
    _check_ended(_run_here(settings.swift, export(settings, base, adapter, out), log, {}, lambda: None), log)
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


class _Progress:
    """ms-swift's log, read now and then."""

    def __init__(self, file: Path, report: Report) -> None:
        self._file, self._report = file, report
        self._rows = self._step = 0

    def reset(self) -> None:
        """Begin an attempt, which may write on where another one ended."""
        self._rows, self._step = len(_read_log(self._file)), 0

    def step(self) -> int:
        """The last one of the attempt, 0 before its first."""
        return self._step

    def read(self) -> None:
        rows = _read_log(self._file)
        if len(rows) > self._rows:
            self._rows, self._step = len(rows), rows[-1]["step"]
            loss = rows[-1]["loss"]
            self._report(rows[-1]["step"], rows[-1]["steps"], f"loss {loss:.3f}", loss)


def _run_here(
    swift: Swift, command: list[str], log: Path, variables: Mapping[str, str], watch: Callable[[], None]
) -> Ended:
    """Run ``swift`` on this machine to its end; ``watch`` is called meanwhile."""
    environment = child_environment() | OFFLINE | dict(variables)
    return Ended(run_watched(_swift(swift, command), log, environment, watch))


def _run_gang(gang: Gang, settings: Train, command: list[str], log: Path, progress: _Progress) -> Ended:
    """Run ``swift`` on the nodes of a gang until all have ended, or one is lost."""
    each = settings.devices // gang.size

    def on_node(meeting: Meeting) -> tuple[list[str], dict[str, str]]:
        return _swift(settings.swift, command), OFFLINE | meeting.variables(each)

    return gang.run(each, on_node, log, progress.read)


def _swift(swift: Swift, command: list[str]) -> list[str]:
    return [str(python(swift.environment).absolute().with_name("swift")), *command]


def _check_ended(ended: Ended, log: Path) -> None:
    """Raise UserError unless ms-swift has ended well; the message holds the end of its log."""
    if ended.code != 0:
        raise UserError(f"ms-swift ended with code {ended.code}; {log} ends with: ... {log_tail(log)}")


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
