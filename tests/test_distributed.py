"""Two processes on the CPU train as one does: the same loss curve, and nothing of them is left when the run dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from stepladder import models
from stepladder.config import Train
from stepladder.errors import MissingExtra, UserError
from stepladder.records import Example, Message
from stepladder.training import distributed, trl
from stepladder.training.data import Data

pytestmark = pytest.mark.dtype

ONE = Train(
    lora_rank=4, lora_alpha=8, epochs=2, learning_rate=1e-2, batch_size=1, gradient_accumulation=4, max_length=70
)


def example(number: int, more: str = "") -> Example:
    said = (("user", f"{number}{more} and {number * 7}?" * 3), ("assistant", f"It is {number * 8}.\nAnswer: A"))
    messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in said)
    return Example(messages=messages, question_id=f"q{number}", teacher="t")


DATA = Data([example(number) for number in range(13)], [example(number, "!") for number in range(3)])  # 13: uneven


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "adapter" / "log.jsonl").read_text().splitlines()]


def trained(folder: Path, base: Path, **changes: object) -> list[dict[str, float]]:
    settings = Train.model_validate(ONE.model_dump() | changes)
    for name in ("adapter", "scratch"):
        (folder / name).mkdir(parents=True)
    trainer = trl.train if settings.devices == 1 else distributed.train
    told: list[int] = []
    trainer(settings, 5, base, DATA, folder / "adapter", folder / "scratch", lambda step, *_: told.append(step))
    assert told
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    return curve(folder)


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    trained(folder, base)
    return folder


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_learn_what_one_does(sharding: str, alone: Path, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    # In bfloat16 processes sum gradients of eight bits, and a step of AdamW is as long for the smallest of them.
    loss_tolerance, share = (2e-4, 1e-3) if models.dtype_name() == "float32" else (0.05, 0.03)
    rows = trained(tmp_path, base, devices=2, sharding=sharding)
    expected = curve(alone)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "validation_loss"):
            assert row.get(name) == pytest.approx(other.get(name), abs=loss_tolerance), (name, row, other)
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, tmp_path))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        assert (weights - two[name]).norm() < share * weights.norm(), name
    configs = [json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (alone, tmp_path)]
    assert configs[0] == configs[1]


KILLED = """
import gc, json, os, signal, sys
from pathlib import Path
import test_distributed as t
from peft import PeftModel
from stepladder.training import trl
folder, base, rank = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
def report(step, *_):
    if step == 1:
        (model,) = (thing for thing in gc.get_objects() if issubclass(type(thing), PeftModel))
        shares = {n: [type(p).__name__, list(p.shape), list(p.to_local().shape)] for n, p in model.named_parameters()}
        (folder / f"shares-{rank}.json").write_text(json.dumps(shares))
    if step == 4 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
trl.train(t.sharded(), 5, base, t.DATA, folder / "adapter", folder / "scratch", report)
"""


def sharded() -> Train:
    return Train.model_validate(ONE.model_dump() | {"devices": 2, "sharding": "fsdp", "save_steps": 3})


def test_killed_processes_that_share_a_base_go_on_from_a_checkpoint_without_it(base: Path, tmp_path: Path) -> None:
    """FSDP on two CPU processes: each holds half of every weight, and writes its half of adapter and optimiser. One is
    killed; training that goes on from the checkpoint ends in the same bytes as one that was never disturbed."""
    rows = trained(tmp_path / "whole", base, devices=2, sharding="fsdp", save_steps=3)
    folder, scratch = tmp_path / "adapter", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.run(
        [*torchrun, str(tmp_path / "killed.py"), str(tmp_path), str(base)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "SIGKILL" in killed.stderr, killed.stderr[-3000:]

    halves = [json.loads((tmp_path / f"shares-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(halves[0]) > 40
    assert halves[0].keys() == halves[1].keys()
    for name, (kind, shape, first) in halves[0].items():
        assert kind == "DTensor", name
        assert first == [-(-shape[0] // 2), *shape[1:]], name
        assert halves[1][name] == [kind, shape, [shape[0] // 2, *shape[1:]]]

    (checkpoint,) = scratch.glob("checkpoint-*")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert {path.name for path in (checkpoint / part).glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    adapter_bytes = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").stat().st_size
    checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert 3 * adapter_bytes < checkpoint_bytes < (base / "model.safetensors").stat().st_size / 10

    steps: list[int] = []
    distributed.train(sharded(), 5, base, DATA, folder, scratch, lambda step, *_: steps.append(step))
    assert steps[0] > 3
    assert curve(tmp_path) == rows
    for name in ("adapter_model.safetensors", "log.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()


def test_two_processes_go_on_from_a_checkpoint(base: Path, tmp_path: Path) -> None:
    """And end in the same bytes as if they had never been disturbed."""
    settings = Train.model_validate(ONE.model_dump() | {"devices": 2, "save_steps": 3})
    rows = trained(tmp_path / "whole", base, devices=2, save_steps=3)
    folder, scratch = tmp_path / "adapter", tmp_path / "scratch"
    folder.mkdir()
    shutil.copytree(tmp_path / "whole" / "scratch" / "checkpoint-6", scratch / "checkpoint-6")
    steps: list[int] = []
    distributed.train(settings, 5, base, DATA, folder, scratch, lambda step, *_: steps.append(step))
    assert steps[0] > 6
    assert curve(tmp_path) == rows
    for name in ("adapter_model.safetensors", "log.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()


def test_a_base_that_does_not_fit_its_config_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"ModelError: .*tensor model\.norm\.weight is missing"):
        trained(tmp_path / "run", tmp_path / "base", devices=2, sharding="fsdp")


def test_a_process_that_fails_says_why(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ended with code 1 \(log: .*torchrun\.log\): ModelError: .*no chat template"):
        (tmp_path / "base").mkdir()
        shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
        (tmp_path / "base" / "chat_template.jinja").unlink()
        trained(tmp_path, tmp_path / "base", devices=2)
    with pytest.raises(MissingExtra, match="deepspeed is not installed: pip install deepspeed"):
        trained(tmp_path / "zero3", base, devices=2, sharding="zero3")


CHILD = """
import sys
from pathlib import Path
import test_distributed as t
t.trained(Path(sys.argv[1]), Path(sys.argv[2]), devices=2, epochs=500)
"""


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown} - found
        found |= grown
    return found


def test_nothing_outlives_a_killed_run(base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), str(base)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL) as parent:
        progress = tmp_path / "run" / "scratch" / "progress.json"
        until = time.monotonic() + 120
        while not progress.exists() and time.monotonic() < until:
            time.sleep(0.1)
        family = descendants(parent.pid)
        assert len(family) >= 4  # supervisor, torchrun, two trainers
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while alive := {pid for pid in family if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


def test_a_base_in_4_bits_teaches_nearly_the_same(tmp_path: Path) -> None:
    """QLoRA: packed weights are near the whole ones, and so is what is learned beside them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes", reason="'pip install bitsandbytes' brings it")
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(tmp_path / "base")
    whole, packed = (trained(tmp_path / str(qlora), tmp_path / "base", qlora=qlora) for qlora in (False, True))
    assert [row["loss"] for row in packed if "loss" in row] != [row["loss"] for row in whole if "loss" in row]
    for row, other in zip(packed, whole, strict=True):
        for name in ("loss", "validation_loss"):
            assert row.get(name) == pytest.approx(other.get(name), abs=0.03), name
    adapter = load_file(tmp_path / "True" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}


def test_devices_share_out_a_step(base: Path) -> None:
    for wrong, said in (
        ({"devices": 3}, "make it a multiple"),
        ({"sharding": "fsdp"}, "needs devices above 1"),
        ({"devices": 2, "sharding": "fsdp", "qlora": True}, "exclude each other"),
        ({"devices": 2, "metric": "accuracy"}, "devices = 1"),
    ):
        with pytest.raises(ValidationError, match=said):
            Train.model_validate(ONE.model_dump() | wrong)
