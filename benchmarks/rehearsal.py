"""The steps of a run on fake tensors (``stepladder plan --rehearse``), against the plan and against real peaks.

    python benchmarks/rehearsal.py            # Qwen2.5-32B and 7B on cards, rehearsed and planned; no weights
    python benchmarks/rehearsal.py --real     # two small models on this CPU: rehearsed, planned and really measured

Real peaks are of memory that no file backs (RssAnon, read every 10 ms), of a process that has done the same task with a
model of next to nothing before, which is what it started from: libraries are not counted. The C library gives every
large tensor a mapping of its own, so that its heap has no gaps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepladder import models
from stepladder.config import Quantise, Train
from stepladder.forecast import memory, model_shape
from stepladder.models.files import read_json

MMAP_THRESHOLD_BYTES = "65536"
LARGE = {"lora_rank": 256, "lora_alpha": 512, "batch_size": 1, "max_length": 4096}
BATCH, LENGTH, SAMPLES, ROWS, PROMPT, ANSWER = 2, 256, 24, 64, 200, 24


def on_cards() -> Iterator[Any]:
    """Rehearsals of models that do not fit here."""
    from stepladder.quantising import gptq
    from stepladder.rehearsal import depths, rehearsal

    gptq.silence()

    def student(size: str) -> rehearsal.Student:
        shape = model_shape.QWEN25_SHAPES[size]
        return rehearsal.Student(depths.architecture(shape), shape)

    def train(size: str, **more: Any) -> rehearsal.Rehearsed:
        settings = Train.model_validate(LARGE | more)
        length = settings.max_length
        return rehearsal.training(student(size), settings, length, length // 2, checkpointing=True)

    yield "32B", train("32B", devices=4, sharding="fsdp")
    yield "32B", train("32B", devices=8, sharding="fsdp")
    yield "32B", train("32B", qlora=True)
    yield "7B", train("7B", qlora=True, lora_rank=64, lora_alpha=128, max_length=2048)
    for size in ("32B", "7B"):
        yield size, rehearsal.quantising(student(size), Quantise(), 2048)
        yield size, rehearsal.quantising_on_host(student(size), Quantise(), 256, 700)
    yield "32B", rehearsal.answering(student("32B"), 32, 300, 400)
    yield "7B", rehearsal.answering(student("7B"), 64, 300, 400)


def example(tokens: int) -> Any:
    """A conversation of about so many tokens, half of them scored."""
    from stepladder.records import Example, Message

    half = " and so on" * (tokens // 6)
    messages = (Message(role="user", content="Say" + half), Message(role="assistant", content="Well" + half))
    return Example(messages=messages, question_id="q", teacher="t")


def train_here(base: Path, folder: Path, checkpointing: bool) -> None:
    """Two steps of LoRA."""
    from stepladder.training import trl
    from stepladder.training.data import Data

    for name in ("adapter", "scratch"):
        (folder / name).mkdir()
    examples = [example(LENGTH) for _ in range(2 * BATCH)]
    trl.train(lora(checkpointing), 1, base, Data(examples), folder / "adapter", folder / "scratch", lambda *_: None)


def lora(checkpointing: bool) -> Train:
    return Train(
        lora_rank=64, batch_size=BATCH, gradient_accumulation=1, max_length=2 * LENGTH, epochs=1, packing=False,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip


def quantise_here(base: Path, folder: Path) -> None:
    from stepladder.quantising import gptq

    gptq.quantise(Quantise(group_size=16), base, [[5] * LENGTH] * SAMPLES, folder / "quantised")


def answer_here(base: Path) -> None:
    from stepladder.ask.local import decoding
    from stepladder.ask.request import Request
    from stepladder.records import Message

    message = (Message(role="user", content="x"),)
    requests = [Request(model="m", messages=message, max_tokens=ANSWER, sample_index=row) for row in range(ROWS)]
    prompts = [(2 + row, *([5] * (PROMPT - 1))) for row in range(ROWS)]
    decoding.decode(models.load(base), requests, prompts, set())


def tiny(folder: Path) -> Path:
    """A model whose weights take next to nothing, to measure what the libraries take."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tasks(base: Path) -> dict[str, tuple[Callable[[Path, Path], None], Callable[[], Any]]]:
    """What is done for real, and its rehearsal, by name."""
    from stepladder.rehearsal import rehearsal
    from stepladder.training.sequences import tokenise

    student = rehearsal.Student(read_json(base / "config.json"), model_shape.read(base), models.compute_dtype())
    (row,) = tokenise(models.load_tokenizer(base), [example(LENGTH)], 2 * LENGTH)

    def rehearsed(checkpointing: bool) -> Any:
        scored = BATCH * len(row.scored)
        return rehearsal.training(student, lora(checkpointing), len(row.ids), scored, checkpointing=checkpointing)

    return {
        "LoRA": (lambda base, folder: train_here(base, folder, False), lambda: rehearsed(False)),
        "LoRA, checkpointing": (lambda base, folder: train_here(base, folder, True), lambda: rehearsed(True)),
        "GPTQ": (
            quantise_here,
            lambda: rehearsal.quantising_on_host(student, Quantise(group_size=16), SAMPLES, LENGTH, has_card=False),
        ),
        "answers": (lambda base, folder: answer_here(base), lambda: rehearsal.answering(student, ROWS, PROMPT, ANSWER)),
    }


def measure(name: str, base: Path, small: Path) -> None:
    """Do a task with both models, in this process; prints what it took above what it held before the second."""
    from peaks import Peak

    do, _ = tasks(base)[name]
    for each in (small, base):
        with tempfile.TemporaryDirectory() as folder, Peak() as peak:
            do(each, Path(folder))
    print(peak.own)


def real_peak(name: str, base: Path, small: Path) -> int:
    """Bytes that a task takes above what it takes with a model of next to nothing, in a process of its own."""
    words = [sys.executable, __file__, "--one", name, str(base), str(small)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD_BYTES}
    said = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return int(said.splitlines()[-1])


def here(root: Path, only: list[str], sizes: int) -> None:
    """Print what two small models take."""
    from memory import larger

    from stepladder.models import template

    (root / "small").mkdir()
    small = tiny(root / "small")
    for make in (lambda: models.locate(models.BUNDLED), lambda: larger(root / "large"))[:sizes]:
        base = make()
        for folder in (base, small):
            template.write(models.load_tokenizer(folder), folder)
        for name, (_, rehearse) in tasks(base).items():
            if only and name not in only:
                continue
            peak, row = real_peak(name, base, small), rehearse()
            size, total = f"{model_shape.read(base).parameters / 1e6:.0f} M", row.peak.total()
            figures = (
                f"{peak / memory.GIB:.2f}",
                f"{total / memory.GIB:.2f} ({100 * (total / peak - 1):+.0f} %)",
                f"{row.planned / memory.GIB:.2f} ({100 * (row.planned / peak - 1):+.0f} %)",
            )
            print(f"| {size}, {name} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="measure two small models on this CPU")
    parser.add_argument("--only", nargs="*", default=[], help="names of tasks, with --real")
    parser.add_argument("--sizes", type=int, default=2, help="of the two models, with --real")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, base, small = asked.one
        measure(name, Path(base), Path(small))
    elif not asked.real:
        for size, row in on_cards():
            kinds = ", ".join(f"{kind} {part / memory.GIB:.1f}" for kind, part in row.peak.most_common(5))
            total, planned = row.peak.total() / memory.GIB, row.planned / memory.GIB
            print(
                f"| {size}, {row.step} | {total:.1f} | {planned:.1f} ({100 * row.deviation:+.0f} %) | {kinds} |",
                flush=True,
            )
    else:
        with tempfile.TemporaryDirectory() as name:
            here(Path(name), asked.only, asked.sizes)


if __name__ == "__main__":
    main()
