"""A few seconds of ``make fuzz``: every kind of hostile input, with fixed seeds."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest

from stepladder.isolation import templates


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_nothing_escapes_and_nothing_raises(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setenv("FUZZ_API_KEY", fuzz.CANARY)
    for seed in range(3 * fuzz.ROUND[kind]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        fuzz.KINDS[kind](random.Random(seed), folder)
