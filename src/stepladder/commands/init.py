"""``stepladder init``: an example run with generated questions, or a configuration for the user's own questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from rich.console import Console

from stepladder.closedworld.generate import generate, to_line
from stepladder.errors import UserError
from stepladder.records import Language
from stepladder.terminal import say
from stepladder.workspace import write_atomic

PROBLEMS = {"train": 60, "test": 20}
"""Generated for the example run."""

STARTER_TOML = """\
# A run of Stepladder: 'stepladder run stepladder.toml'. Every key is explained in docs/reference/configuration.md.
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


TEACHER_TOML = """\
# A run of Stepladder: 'stepladder plan stepladder.toml', then 'stepladder run stepladder.toml'.
# Every key is explained in docs/reference/configuration.md.
name = "{name}"
language = "{language}"      # of prompts and chains

[questions]
train = "train.jsonl"        # your labelled problems, a JSON object a line; 'stepladder import' converts other formats
# test = "test.jsonl"        # held-out problems, labels optional: without them validation is what is reported
validation = 0.15            # share of the training problems held out for every choice

[limits]
dollars = 20.0               # hard cap of the run, all restarts together

[models.base]
path = "{base}"              # the student before training; weights in this process cost nothing
{models}
[[rung]]
name = "easy"                # what the student can do already
models = ["base"]
orders = 2                   # right in both shuffled orders of the options, or the question goes up
max_tokens = 1024

# [[rung]]                   # where questions carry worked solutions, these are chains as well, and cost nothing
# name = "worked"
# kind = "worked"

[[rung]]
name = "medium"              # the rest goes to a cheap teacher
models = ["cheap"]
temperature = 1.0            # the only one that some models take
max_tokens = 2048            # reasoning that is billed counts

[[rung]]
name = "hard"                # and what is left to a strong one: five answers, the majority must equal the label
models = ["strong"]
temperature = 1.0
samples = 5
accept = "majority"
keep = 2                     # of the agreeing chains, the two that differ most
max_tokens = 4096

[train]
base = "{base}"
lora_rank = 64
lora_alpha = 128
epochs = 3
learning_rate = 1e-4

[[member]]
name = "a"

[quantise]
samples = 256                # conversations of the student's own training set that GPTQ is calibrated on
max_loss = 0.05              # a loss of so much validation accuracy must be excluded; more orders are asked until it is

[predict]
max_tokens = 1024
"""

MODELS = {
    "openai": """
# Prices: dollars per million tokens as listed in October 2026, prompts at what writing the prompt cache costs, the
# dearest. Look them up before you spend; 'stepladder doctor --models stepladder.toml' says whether the names exist.
[models.cheap]
engine = "openai"
model = "gpt-6-luna"
base_url = "https://api.openai.com/v1"
api_key_env = "OPENAI_API_KEY"            # keys come from the environment and are written nowhere
cap_name = "max_completion_tokens"
price = { input = 0.125, output = 0.50 }
extra_body = { reasoning_effort = "none" }  # its chain is then in the answer; otherwise it takes no temperature

[models.strong]
engine = "openai"
model = "gpt-6.1-terra"
base_url = "https://api.openai.com/v1"
api_key_env = "OPENAI_API_KEY"
cap_name = "max_completion_tokens"
price = { input = 1.25, output = 5.00 }
extra_body = { reasoning_effort = "none" }
""",
    "self-hosted": """
# Servers of your own, such as 'vllm serve MODEL --generation-config vllm'; price 0, so each shows first what it serves.
[models.cheap]
engine = "openai"
model = "Qwen/Qwen2.5-14B-Instruct"
base_url = "http://127.0.0.1:8000/v1"
price = { input = 0, output = 0 }

[models.strong]
engine = "openai"
model = "Qwen/Qwen2.5-72B-Instruct"
base_url = "http://127.0.0.1:8001/v1"
price = { input = 0, output = 0 }
""",
}


def init(folder: Path, language: str, teacher: str | None, base: str | None, console: Console) -> None:
    """Write an example run, or with ``teacher`` and ``base`` a configuration for the user's own questions; print the
    next step.

    Raises:
        UserError: ``teacher`` without ``base`` or the reverse, or a file is already there with another content.
    """
    if teacher is None and base is None:
        toml = write_starter(folder, language)
        say(console, f"Wrote {toml}. Next: stepladder run {toml}")
        return
    if teacher is None or base is None:
        raise UserError("--teacher and --base go together: who writes the chains, and the model that learns from them")
    if not re.fullmatch(r"[\w./:@~-]+", base):
        raise UserError(f"--base {base!r}: give a folder or a hub's id, such as Qwen/Qwen2.5-7B-Instruct")
    toml = folder / "stepladder.toml"
    text = TEACHER_TOML.format(name=_run_name(folder), language=language, base=base, models=MODELS[teacher])
    _write(folder, {toml: text})
    questions = folder / "train.jsonl"
    say(console, f"Wrote {toml}. Next: put your questions into {questions}, then stepladder plan {toml}")


def write_starter(folder: Path, language: str) -> Path:
    """Write ``stepladder.toml``, ``train.jsonl`` and ``test.jsonl`` into a folder; returns the first's path.

    Raises:
        UserError: one of the files is already there with another content.
    """
    toml = folder / "stepladder.toml"
    texts = {
        folder / f"{split}.jsonl": "".join(map(to_line, generate(2024, count, cast(Language, language), split)))
        for split, count in PROBLEMS.items()
    }
    _write(folder, texts | {toml: STARTER_TOML.format(name=_run_name(folder), language=language)})
    return toml


def _write(folder: Path, texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        if path.exists() and (not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text):
            raise UserError(f"{path} is already there; nothing was written. Move it away or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    for path, text in texts.items():
        write_atomic(path, text)


def _run_name(folder: Path) -> str:
    """A valid run name made of the folder's name."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.resolve().name)
    return name.lstrip(".") or "run"
