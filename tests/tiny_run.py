"""A run with the real bundled model on a handful of questions, and the command line a user types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stepladder.closedworld.generate import generate, to_line

TOML = """
name = "tiny"
language = "en"

[questions]
train = "train.jsonl"
test = "test.jsonl"
validation = 0.3

[models.student]

[[rung]]
name = "easy"
models = ["student"]
orders = 2
max_tokens = 4

[[rung]]
name = "worked"
kind = "worked"

[train]
lora_rank = 4
lora_alpha = 8
epochs = 1
learning_rate = 1e-3
warmup = 0.0
batch_size = 2
gradient_accumulation = 2

[[member]]
name = "all"

[[member]]
name = "half"
teachers = ["worked"]
share = 0.5
seed = 1

[quantise]
method = "rtn"   # GPTQ takes half a minute a member; test_quantise.py has it
group_size = 64
max_loss = 1.0
max_unparsed = 1.0
max_kl = 100.0

[predict]
max_tokens = 8
"""


def stepladder(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepladder", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def make(folder: Path) -> None:
    """A configuration, questions and one finished run."""
    (folder / "tiny.toml").write_text(TOML, encoding="utf-8")
    for split, problems in (("train", 5), ("test", 2)):
        text = "".join(map(to_line, generate(2024, problems, "en", split)))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    done = stepladder(folder, "run", "tiny.toml")
    assert (done.returncode, done.stderr) == (0, ""), "nor does any library say anything"
