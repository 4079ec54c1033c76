"""The memory that ``stepladder plan`` forecasts, against what training and quantising really take, on this machine.

    python benchmarks/memory.py

Two sizes: the bundled model, and one of random weights with SmolLM2-360M's published shape and the bundled tokenizer.
Each is trained for some steps with and without gradient checkpointing, and quantised, each time in a process of its own
whose peak is what the system counted (its maximum resident set).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from training import examples

from stepladder import models
from stepladder.config import Quantise, Train
from stepladder.forecast import memory, model_shape
from stepladder.quantising import gptq
from stepladder.training import trl
from stepladder.training.data import Data
from stepladder.training.sequences import IGNORED, pack, tokenise

LENGTH, BATCH, RANK, SAMPLES, STEPS = 512, 2, 64, 24, 3


def larger(folder: Path) -> Path:
    """A model of random weights in the shape of SmolLM2-360M."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    bundled = models.locate(models.BUNDLED)
    config = LlamaConfig.from_pretrained(bundled)
    shape = {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5,
    }  # fmt: skip
    config.update(shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    models.load_tokenizer(bundled).save_pretrained(folder)
    return folder


def one(task: str, base: Path, folder: Path) -> None:
    """Do a task and print what the forecast needs to know of it; run in a process of its own."""
    problems = examples(folder, 14, 1)
    rows = tokenise(models.load_tokenizer(base), problems, LENGTH)
    if task == "quantise":
        from stepladder.models import template

        template.write(models.load_tokenizer(base), base)
        calibration = [row.ids for row in rows[:SAMPLES]]
        gptq.quantise(Quantise(group_size=32), base, calibration, folder / "quantised")
        print(json.dumps({"samples": len(calibration), "tokens": sum(map(len, calibration)) / len(calibration)}))
        return
    settings = Train(
        lora_rank=RANK, batch_size=BATCH, gradient_accumulation=1, max_length=LENGTH, epochs=1, save_steps=10_000,
        gradient_checkpointing=task == "checkpointing",
    )  # fmt: skip
    packs = sorted(pack(rows, LENGTH), key=lambda one: -len(one.input_ids))[: BATCH * STEPS]
    longest = packs[:BATCH]
    (folder / "adapter").mkdir()
    (folder / "scratch").mkdir()
    trl.train(settings, 1, base, Data(problems), folder / "adapter", folder / "scratch", lambda *_: None)
    tokens = BATCH * len(longest[0].input_ids)
    scored = sum(label != IGNORED for one in longest for label in one.labels)
    print(json.dumps({"tokens": tokens, "scored": scored}))


def forecast(task: str, base: Path, told: dict[str, float]) -> memory.Parts:
    shape = model_shape.read(base)
    each = models.compute_dtype().itemsize
    if task == "quantise":
        return memory.quantising(shape, int(told["samples"]), int(told["tokens"]), bytes_each=each)
    return memory.training(
        shape,
        RANK,
        int(told["tokens"]),
        int(told["scored"]),
        bytes_each=each,
        checkpointing=task == "checkpointing",
        cards=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.base, asked.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small = root / "small"
        small.symlink_to(models.locate(models.BUNDLED))
        for base in (small, larger(root / "large")):
            print(f"{model_shape.read(base).parameters / 1e6:.0f} M parameters")
            for task in ("plain", "checkpointing", "quantise"):
                folder = root / f"{base.name}-{task}"
                folder.mkdir()
                words = [sys.executable, __file__, "--one", task, "--base", str(base), "--folder", str(folder)]
                with (folder / "said").open("w") as file:
                    child = subprocess.Popen(words, stdout=file)
                    _, status, usage = os.wait4(child.pid, 0)
                if os.waitstatus_to_exitcode(status):
                    raise SystemExit(f"{task} failed")
                told = json.loads((folder / "said").read_text().splitlines()[-1])
                parts, peak = forecast(task, base, told), usage.ru_maxrss * 1024
                pieces = ", ".join(f"{part} {size / memory.GIB:.2f}" for part, size in parts._asdict().items() if size)
                print(
                    f"  {task:14} peak {peak / memory.GIB:.2f} GiB, forecast {parts.total / memory.GIB:.2f} "
                    f"({100 * (parts.total / peak - 1):+.0f} %): {pieces}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
