"""A training killed in the middle goes on and ends with the very adapter and log of one that was not."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stepladder.config import Train
from stepladder.errors import MissingExtra, UserError
from stepladder.records import Example, Message
from stepladder.training import trl
from stepladder.training.data import Data, Watch, last_complete_checkpoint

pytestmark = pytest.mark.dtype

CHILD = """
import os, signal, sys
from pathlib import Path
from stepladder.config import Train
from stepladder.records import Example, Message
from stepladder.training import trl
from stepladder.training.data import Data

base, folder, scratch, dies = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

def example(n, held_out=""):
    asked, said = f"{n}{held_out} and {n * 7}?" * 3, f"It is {n * 8}.\\nAnswer: A"
    messages = (Message(role="user", content=asked), Message(role="assistant", content=said))
    return Example(messages=messages, question_id=f"q{n}", teacher="t")

def report(step, *_):
    if step == dies:
        os.kill(os.getpid(), signal.SIGKILL)

folder.mkdir(exist_ok=True)
scratch.mkdir(exist_ok=True)
settings = Train(
    lora_rank=4, lora_alpha=8, lora_dropout=0.1, epochs=3, learning_rate=1e-2, batch_size=2, gradient_accumulation=2,
    save_steps=3, max_length=70, packing=False,
)
data = Data([example(n) for n in range(20)], [example(n, "!") for n in range(4)])
trl.train(settings, 5, base, data, folder, scratch, report)
"""


def train(base: Path, where: Path, dies: int = 0) -> int:
    words = [sys.executable, "-c", CHILD, str(base), str(where), str(where.with_suffix(".scratch")), str(dies)]
    return subprocess.run(words, capture_output=True, check=False, timeout=300).returncode


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_killed_training_ends_with_the_same_adapter(base: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(base, whole) == 0
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 16))
    assert [row["epoch"] for row in rows if "validation_loss" in row] == [1, 2, 3]
    assert train(base, killed, dies=11) == -signal.SIGKILL  # in the last epoch, two steps after a checkpoint
    (tmp_path / "killed.scratch" / "checkpoint-12").mkdir()  # one that was being written
    assert train(base, killed) == 0
    assert files(killed) == files(whole)


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes a minute; set KILLS=5 for it")
def test_a_training_killed_again_and_again_ends_with_the_same_adapter(base: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(base, whole) == 0
    for step in sorted(random.Random(2024).sample(range(1, 16), int(os.environ["KILLS"]))):
        assert train(base, killed, dies=step) == -signal.SIGKILL
    assert train(base, killed) == 0
    assert files(killed) == files(whole)


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for name, state in (("checkpoint-5", "{}"), ("checkpoint-10", "{}"), ("checkpoint-15", '{"half')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-20").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}


def test_the_best_epoch_by_validation_accuracy_is_kept(base: Path, tmp_path: Path) -> None:
    """The exam here praises the first epoch and then always finds fault."""
    from safetensors.torch import load_file

    scores = iter([0.75, 0.5, 0.25, 0.125])
    seen: list[dict[str, Any]] = []

    def exam(tokenizer: object, student: Any, watch: Watch) -> float:
        assert not student.training
        weights = {name: weight.clone() for name, weight in student.named_parameters() if "lora_B" in name}
        seen.append(weights)
        watch(7, 9)
        return next(scores)

    folder, scratch = tmp_path / "adapter", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    settings = Train(
        lora_rank=4, lora_alpha=8, epochs=4, learning_rate=1e-2, batch_size=2, metric="accuracy", patience=2
    )
    said = (Message(role="user", content="Who?"), Message(role="assistant", content="Bob.\nAnswer: A"))
    examples = [Example(messages=said, question_id=f"q{n}", teacher="t") for n in range(9)]
    reports: list[tuple[int, int, str, float | None]] = []
    trl.train(settings, 5, base, Data(examples, [], exam), folder, scratch, lambda *now: reports.append(now))
    epoch = reports[-1][0] // 3
    assert [now[0] for now in reports if now[2:] == ("validation, 7 of 9", None)] == [epoch, 2 * epoch, 3 * epoch]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["validation_accuracy"] for row in rows if "validation_accuracy" in row] == [0.75, 0.5, 0.25]
    kept = load_file(folder / "adapter_model.safetensors")
    best = {f"base_model.model.{name.replace('.default', '')}": weight for name, weight in seen[0].items()}
    for name, weight in best.items():
        assert (kept[name] == weight).all(), name
    assert any((kept[f"base_model.model.{name.replace('.default', '')}"] != w).any() for name, w in seen[1].items())


def test_patience_without_anything_to_measure_is_refused(base: Path, tmp_path: Path) -> None:
    said = (Message(role="user", content="Who?"), Message(role="assistant", content="Bob.\nAnswer: A"))
    data = Data([Example(messages=said, question_id="q", teacher="t")])
    with pytest.raises(UserError, match=r"patience = 2 has no validation loss to go by: .* set metric = 'accuracy'"):
        trl.train(Train(patience=2), 5, base, data, tmp_path, tmp_path, lambda *_: None)


@pytest.mark.parametrize("key", [{"patience": 1}, {"packing": True}, {"tensorboard": "curves"}, {"metric": "accuracy"}])
def test_what_ms_swift_cannot_do_is_refused(key: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=rf"{next(iter(key))} is for backend = 'trl'"):
        Train.model_validate({"backend": "swift", **key})
    assert Train.model_validate({"backend": "swift", "packing": False}).packing is False
    assert Train.model_validate({"backend": "swift"}).backend == "swift", "what nobody set is not refused"


def test_curves_for_tensorboard_need_it(base: Path, tmp_path: Path) -> None:
    settings = Train(tensorboard=tmp_path / "curves")
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(MissingExtra, match="tensorboard is not installed: pip install tensorboard"):
            trl.tensorboard_writer(settings, tmp_path / ".all.scratch")
    else:
        trl.tensorboard_writer(settings, tmp_path / ".all.scratch").add_scalar("loss", 1.0, 1)
        assert list((tmp_path / "curves" / "all").iterdir())
