"""Finished models and adapters are members: not trained, but merged, quantised, measured and joined like the others."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from stepladder import cli, models
from stepladder.closedworld.generate import generate, to_line
from stepladder.config import Member, load
from stepladder.context import Context, parts
from stepladder.errors import ConfigError, ModelError, TemplateError
from stepladder.models import template
from stepladder.stages import flow
from stepladder.training import merging

pytestmark = pytest.mark.dtype
torch = pytest.importorskip("torch")

TOML = """
name = "run"
language = "en"

[questions]
train = "train.jsonl"
validation = 0.4

[[rung]]
name = "worked"
kind = "worked"

[train]
base = "base"

[[member]]
name = "whole"
path = "whole"

[[member]]
name = "adapted"
path = "adapted"
share = 0.5

[quantise]
method = "rtn"
group_size = 32
max_loss = 1.0
max_unparsed = 1.0
max_kl = 100.0
repairs = []

[predict]
max_tokens = 4
"""


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that somebody trained with PEFT alone."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    tuned = get_peft_model(
        models.load(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with that adapter, as any other program leaves a model."""
    folder = tmp_path_factory.mktemp("whole")
    with_fingerprint = tmp_path_factory.mktemp("fingerprint") / "adapter"
    shutil.copytree(adapter, with_fingerprint)
    template.write(models.load_tokenizer(base), with_fingerprint)
    merging.merge(base, with_fingerprint, folder)
    (folder / template.FINGERPRINT_FILE).unlink()
    return folder


@pytest.fixture
def folder(base: Path, adapter: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.jsonl").write_text("".join(map(to_line, generate(2024, 5, "en", "train"))), encoding="utf-8")
    (tmp_path / "run.toml").write_text(TOML)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapted")
    shutil.copytree(whole, tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["stepladder", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_they_go_the_whole_way_without_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", "run.toml", monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    out = folder / "runs" / "run"
    assert [path.name for path in (out / "adapter").iterdir() if not path.name.startswith(".")] == ["adapted"]
    weights = {name: (out / "merged" / name / "model.safetensors").read_bytes() for name in ("whole", "adapted")}
    assert weights["whole"] == (folder / "whole" / "model.safetensors").read_bytes() == weights["adapted"]
    for name in ("whole", "adapted"):
        assert (out / "quantised" / name / "verdict.json").exists()
        assert "trained elsewhere" in (out / "quantised" / name / "README.md").read_text()
        assert (out / "predictions" / name / "quantised.validation.jsonl").exists()
    choice = json.loads((out / "ensemble" / "choice.json").read_text())
    assert {*choice["members"]} <= {"whole", "adapted"}
    assert (out / "report" / "report.html").exists()
    assert run("status", "run.toml", monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("run", "run.toml", monkeypatch=monkeypatch) == 0
    assert "up to date" in capsys.readouterr().out
    config = folder / "adapted" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    context = Context.open(Path("run.toml"), Path("runs"))
    assert next(place.label for place, state in flow.states(context) if state == "stale") == "adapter/adapted"


def test_a_finished_model_has_no_adapter_stage(folder: Path) -> None:
    config = load(folder / "run.toml")
    assert parts(config, "adapter") == ("adapted",)
    assert parts(config, "merged") == ("whole", "adapted")
    assert config.member[0].path == str(folder / "whole")


@pytest.mark.parametrize("key", ["variants = true", "balance = true"])
def test_what_only_training_uses_is_refused(folder: Path, key: str) -> None:
    (folder / "run.toml").write_text(TOML.replace('path = "whole"', f'path = "whole"\n{key}'))
    with pytest.raises(ConfigError, match=r"a member with path is finished.* leave (variants|balance) out"):
        load(folder / "run.toml")
    with pytest.raises(ValueError, match="leave control out"):
        Member(name="m", path="x", control="y")


@pytest.mark.parametrize("broken", ["gone", "quantised", "pickled"])
def test_what_cannot_be_used_is_said_before_anything_is_run(
    folder: Path, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken == "gone":
        shutil.rmtree(folder / "whole")
    elif broken == "quantised":
        config = folder / "whole" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {}}))
    else:
        (folder / "adapted" / "adapter_model.safetensors").rename(folder / "adapted" / "adapter_model.bin")
    assert run("run", "run.toml", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert {"gone": "no config.json in whole", "quantised": "is quantised", "pickled": "no adapter_model.safetensors"}[
        broken
    ] in said
    assert not (folder / "runs" / "run" / "questions").exists()


def test_an_adapter_of_another_template_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    fingerprint = {"sha256": "another", "conversations": [{"prompt": [1], "completion": [2]}] * 2}
    (tmp_path / "adapter" / template.FINGERPRINT_FILE).write_text(json.dumps(fingerprint))
    (tmp_path / "out").mkdir()
    with pytest.raises(TemplateError, match="the chat template changed"):
        merging.adopt_adapter(tmp_path / "adapter", base, tmp_path / "out")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        models.locate_adapter(str(tmp_path / "out"))
