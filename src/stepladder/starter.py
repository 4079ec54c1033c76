"""What ``stepladder init`` writes: a configuration with every stage in it, and generated questions to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from stepladder.closedworld.generate import generate, to_line
from stepladder.errors import UserError
from stepladder.records import Language
from stepladder.workspace import write_atomic

PROBLEMS = {"train": 60, "test": 20}

TOML = """\
# A run of Stepladder: 'stepladder run stepladder.toml'. Every key is explained in src/stepladder/config.py.
name = "{name}"
language = "{language}"

[questions]
train = "train.jsonl"        # replace by your own labelled problems, one JSON object a line
test = "test.jsonl"
validation = 0.2             # share of the training problems held out for every choice

[models.student]
path = "bundled"             # SmolLM2-135M-Instruct; or a folder with a Hugging Face model

[[rung]]
name = "easy"                # what the student can do already
models = ["student"]
orders = 2
max_tokens = 64

[[rung]]
name = "worked"              # the worked solutions that came with the questions
kind = "worked"

[train]
base = "bundled"
lora_rank = 32
lora_alpha = 64
epochs = 2
learning_rate = 1e-3
batch_size = 4
gradient_accumulation = 1

[[member]]
name = "a"

[quantise]
group_size = 64              # must divide the layers' widths (576 and 1536 here)
samples = 32
max_loss = 0.05

[predict]
max_tokens = 160
"""


def write_starter(folder: Path, language: str) -> Path:
    """Write ``stepladder.toml``, ``train.jsonl`` and ``test.jsonl`` into a folder and return the first's path.

    Raises:
        UserError: the language is unknown, or one of the files is already there and says something else.
    """
    if language not in get_args(Language):
        raise UserError(f"language {language!r} is unknown; use one of: {', '.join(get_args(Language))}")
    toml = folder / "stepladder.toml"
    texts = {
        folder / f"{split}.jsonl": "".join(map(to_line, generate(2024, count, cast(Language, language), split)))
        for split, count in PROBLEMS.items()
    } | {toml: TOML.format(name=_run_name(folder), language=language)}
    for path, text in texts.items():
        if path.exists() and (not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text):
            raise UserError(f"{path} is already there; nothing was written. Move it away or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    for path, text in texts.items():
        write_atomic(path, text)
    return toml


def _run_name(folder: Path) -> str:
    """The folder's name as a run's name may be spelt."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.resolve().name)
    return name.lstrip(".") or "run"
