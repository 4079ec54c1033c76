"""Which engine answers where the TOML names none."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepladder.config import load, settings

TOML = """
name = "n"
language = "en"
[questions]
train = "train.jsonl"
[[rung]]
name = "worked"
kind = "worked"
[[member]]
name = "a"
[serve]
environment = "{environment}"
[predict]
{engine}
"""


@pytest.mark.parametrize(
    ("engine", "cards", "has_vllm", "expected"),
    [
        ("", "0", True, "vllm"),
        ("", "0", False, "local"),
        ("", "", True, "local"),
        ("", "-1", True, "local"),
        ('engine = "local"', "0", True, "local"),
        ('engine = "vllm"', "", False, "vllm"),
    ],
)
def test_a_card_with_vllm_beside_it_answers_by_vllm(
    engine: str, cards: str, has_vllm: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
    if has_vllm:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "vllm").touch()
    (tmp_path / "run.toml").write_text(TOML.format(environment=tmp_path, engine=engine))
    predict = load(tmp_path / "run.toml").predict
    assert predict.engine == expected
    # Left out, it is no setting: the run stays up to date on a machine without a card.
    assert settings(predict)["engine"] == (expected if engine else "local")
