"""The default trainer against ms-swift with the winning entry's flags, on the same data, in one run.

    python benchmarks/training.py [--swift .venv-swift] [--problems 48] [--epochs 1] [--rank 32]

The bundled model, LoRA on all linear layers, two questions to a problem, 8 conversations to an optimiser step.
ms-swift: one conversation at a time, accumulation 8, gradient checkpointing. Ours: one problem at a time, accumulation
4, no checkpointing. Tokens are those of the conversations, however few a trainer computes; seconds are from the first
step to the last, start-up apart. Each trains in a process of its own. Validation loss is measured on other problems, by
the same code. Then two of our steps are profiled, and held against what this machine multiplies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stepladder import models
from stepladder.closedworld.generate import generate
from stepladder.config import Swift, Train
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.questionfile import stream_problems
from stepladder.records import Example, Message
from stepladder.training import loss, swift, trl
from stepladder.training.data import Data
from stepladder.training.sequences import pack, tokenise

LENGTH = 320
"""Longest sequence, tokens; at this length ours packs two conversations into one on average, so 8 make a step too."""


def examples(folder: Path, problems: int, seed: int) -> list[Example]:
    """Conversations with worked solutions, two to a problem."""
    path = folder / f"{seed}.jsonl"
    text = (json.dumps(problem, ensure_ascii=False) for problem in generate(seed, problems, "en", "train"))
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    found = []
    for problem in stream_problems(path, "en", labelled=True):
        for question in problem.questions[:2]:
            order = tuple(range(len(question.options)))
            answer = Message(role="assistant", content=str(worked_solution(question, order)))
            messages = (*ask_messages(question, order), answer)
            found.append(Example(messages=messages, question_id=question.id, teacher="worked"))
    return found


def settings(asked: argparse.Namespace, trainer: str) -> Train:
    common = {
        "lora_rank": asked.rank, "lora_alpha": 2 * asked.rank, "epochs": asked.epochs, "learning_rate": 1e-4,
        "max_length": LENGTH, "batch_size": 1, "save_steps": 10_000,
    }  # fmt: skip
    own = {
        "trl": {"gradient_accumulation": 4, "gradient_checkpointing": False},
        "swift": {
            "backend": "swift", "gradient_accumulation": 8, "gradient_checkpointing": True, "lora_dropout": 0.05,
            "adam_beta2": 0.95,
            "swift": Swift(environment=asked.swift, model_type="llama", template="chatml"),
        },
    }  # fmt: skip
    return Train.model_validate(common | own[trainer])


def one(asked: argparse.Namespace, trainer: str, folder: Path) -> None:
    """Train and print what was measured as JSON; run in a process of its own."""
    base, place = models.locate(models.BUNDLED), folder / trainer
    for name in ("adapter", "scratch"):
        (place / name).mkdir(parents=True)
    told: list[tuple[float, int]] = []
    data = Data(examples(folder, asked.problems, 1))
    train = {"trl": trl.train, "swift": swift.train}[trainer]
    train(
        settings(asked, trainer), 1, base, data, place / "adapter", place / "scratch",
        lambda step, *_: told.append((time.perf_counter(), step)),
    )  # fmt: skip
    (start, first), (end, last) = told[0], told[-1]
    print(json.dumps({"seconds_a_step": (end - start) / (last - first), "steps": last}))


def loss_of(adapter: Path, folder: Path) -> float:
    from peft import PeftModel

    base = models.locate(models.BUNDLED)
    model = models.load(base)
    loss.score_completions(model)
    packs = pack(tokenise(models.load_tokenizer(base), examples(folder, 16, 2), LENGTH), LENGTH)
    return loss.validation_loss(PeftModel.from_pretrained(model, adapter), packs, 1)


def measure(asked: argparse.Namespace, trainer: str, folder: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--one", trainer, "--folder", str(folder)]
    for name in ("swift", "problems", "epochs", "rank"):
        words += [f"--{name}", str(getattr(asked, name))]
    said = folder / f"{trainer}.json"
    with said.open("w") as file:
        child = subprocess.Popen(words, stdout=file)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{trainer} ended with {child.returncode}")
    adapter = folder / trainer / "adapter"
    return json.loads(said.read_text().splitlines()[-1]) | {
        "peak": usage.ru_maxrss / 2**20,
        "loss": loss_of(adapter, folder),
    }


def profile(asked: argparse.Namespace, folder: Path) -> None:
    """Where the time of our steps goes, and what share of this machine's matrix products they reach."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    base = models.locate(models.BUNDLED)
    model = models.load(base)
    count = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    tuned = get_peft_model(model, LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear"))
    packs = pack(tokenise(models.load_tokenizer(base), examples(folder, asked.problems, 1), LENGTH), LENGTH)[:9]
    batches = [loss.collate([one._asdict()]) for one in packs]
    for batch in batches[:1]:
        loss.completion_loss(model, batch).backward()
    start = time.perf_counter()
    with profiled(activities=[ProfilerActivity.CPU]) as found:
        for batch in batches[1:]:
            loss.completion_loss(model, batch).backward()
    seconds = time.perf_counter() - start
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("our time by operation: " + ", ".join(
        f"{event.key.removeprefix('aten::')} {100 * event.self_cpu_time_total / total:.0f} %" for event in events[:8]
    ))  # fmt: skip
    tokens = sum(len(one.input_ids) for one in packs[1:])
    lora = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    work = tokens * (4 * count + 6 * lora)  # frozen weights: forward and the input's gradient
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    a @ b
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    limit = 10 * 2 * 2048**3 / (time.perf_counter() - start)
    print(f"{work / seconds / 1e9:.0f} of {limit / 1e9:.0f} GFLOP/s ({100 * work / seconds / limit:.0f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", type=Path, default=Path(".venv-swift"))
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--one", choices=["trl", "swift"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked, asked.one, asked.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
        rows = tokenise(tokenizer, examples(folder, asked.problems, 1), LENGTH)
        tokens = sum(len(row.ids) for row in rows)
        computed = sum(len(one.input_ids) for one in pack(rows, LENGTH))
        print(f"{len(rows)} conversations, {tokens:,} tokens, of which ours computes {computed:,}", flush=True)
        found = {}
        for trainer in ("trl", "swift"):
            found[trainer] = row = measure(asked, trainer, folder)
            speed = tokens * asked.epochs / row["steps"] / row["seconds_a_step"]
            row["speed"] = speed
            print(
                f"{trainer:6} {row['steps']} steps, {speed:.0f} tokens/s, validation loss {row['loss']:.4f}, "
                f"peak {row['peak']:.2f} GiB",
                flush=True,
            )
        print(f"ours is {found['trl']['speed'] / found['swift']['speed']:.2f} times as fast")
        profile(asked, folder)


if __name__ == "__main__":
    main()
