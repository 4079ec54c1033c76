"""``doctor --card``: its steps with the CPU as the device, and what it writes."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path

import pytest

from stepladder import cli, models
from stepladder.smoke import trial
from stepladder.smoke.steps import STEPS, SmokeJob

pytestmark = pytest.mark.dtype


@pytest.mark.parametrize("name", ["answer", "train", "quantise"])
def test_a_step_works_with_the_cpu_as_device(name: str, base: Path, tmp_path: Path) -> None:
    figures = STEPS[name].do(SmokeJob(base, tmp_path, tmp_path))
    assert all(value >= 0 for value in figures.values())
    assert figures.get("steps", 1) >= 1  # the examples share a prefix and are packed


def test_what_is_written_names_no_path_and_no_user(base: Path, tmp_path: Path) -> None:
    """One step that works, in a process of its own, and one that fails there."""
    lines: list[str] = []
    results = trial.run(
        base, tmp_path / "venv", 1, lambda name, line: lines.append(f"{name}: {line}"), ("answer", "fsdp", "serve")
    )
    broken = trial.run(tmp_path / "nothing", tmp_path, 1, lambda *_: None, ("answer",))
    assert [results["steps"][name]["outcome"] for name in ("answer", "fsdp", "serve")] == [
        "passed",
        "skipped",
        "skipped",
    ]
    assert results["steps"]["answer"]["figures"]["answers"] == 8
    assert broken["steps"]["answer"]["outcome"] == "failed"
    assert "<path>" in broken["steps"]["answer"]["reason"]
    assert trial.passed(results)
    assert not trial.passed(broken)
    assert len(lines) == 3
    trial.write(results | {"broken": broken}, tmp_path / "card.json")
    text = (tmp_path / "card.json").read_text(encoding="utf-8")
    assert json.loads(text)["machine"]["versions"]["torch"]
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text.replace('"', "/")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ModelError: /home/me/models/x: no config.json", "ModelError: <path>: no config.json"),
        ("refused by http://10.0.0.7:8000/v1 with sk-abcdefgh12345", "refused by <url> with <key>"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer <key>"),
        (f"user {getpass.getuser()}", "user <name>" if len(getpass.getuser()) > 2 else f"user {getpass.getuser()}"),
        ("CUDA error: no kernel image is available", "CUDA error: no kernel image is available"),
    ],
)
def test_reasons_are_cleaned(text: str, kept: str) -> None:
    assert trial.without_private(text) == kept


def test_without_a_card_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if models.has_cuda():
        pytest.skip("there is a card")
    monkeypatch.setattr(sys, "argv", ["stepladder", "doctor", "--card"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: --card: PyTorch sees no CUDA card on this machine, so there is nothing to try\n"
    )
