"""What a student thinks of chains before it learns them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepladder import models
from stepladder.training import fit
from stepladder.training.fit import MAX_RANK, Fit, fits
from stepladder.training.sequences import TokenRow

torch = pytest.importorskip("torch")

ROWS = [TokenRow([*range(5, 45)], 20), TokenRow([*range(7, 30)], 22), TokenRow([9, 8, 7], 1)]


def test_surprisal_and_rank_are_those_of_the_whole_model(base: Path) -> None:
    model = models.load(base, "float32")
    model.train(False)
    for row, found in zip(ROWS, fits(base, ROWS, "float32"), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].float()
        completion = row.ids[row.prompt_length :]
        before = torch.log_softmax(logits[list(row.scored)], -1)
        own = [float(line[token]) for line, token in zip(before, completion, strict=True)]
        better = [int((line > line[token]).sum()) + 1 for line, token in zip(before, completion, strict=True)]
        assert found.surprisal == pytest.approx(-sum(own) / len(own), rel=1e-4)
        assert found.rank == pytest.approx(sum(min(rank, MAX_RANK) for rank in better) / len(better))
        assert found.ratio == pytest.approx(found.rank / found.surprisal)


def test_rows_in_several_chunks_are_measured_as_in_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fits(base, ROWS, "float32")
    monkeypatch.setattr(fit, "CHUNK_TOKENS", 30)
    reported: list[tuple[int, int]] = []
    assert fits(base, ROWS, "float32", lambda *done: reported.append(done)) == whole
    assert reported == [(0, 3), (1, 3)]


def test_nothing_is_measured_of_nothing(base: Path) -> None:
    assert fits(base, [], "float32") == []


def test_what_the_student_would_say_anyway_has_a_high_ratio() -> None:
    said, new, foreign = Fit(0.1, 1.1), Fit(1.5, 2.0), Fit(6.0, 60.0)
    assert new.ratio < said.ratio
    assert new.ratio < foreign.ratio
    assert Fit(0.0, 1.0).ratio > 0
