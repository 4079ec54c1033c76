"""Time and money of each artifact of a run, from its manifests and samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from stepladder.context import FINAL
from stepladder.records import Sample, read
from stepladder.reporting.content import StageCost
from stepladder.workspace import read_manifest


class Folder(NamedTuple):
    """An artifact of the run: its stage, with the folder that it is in, and its part."""

    stage: str
    part: str | None


def stages(run: Path, folders: Iterable[Folder]) -> Iterator[StageCost]:
    """Recorded time and money of each artifact. Only teachers cost money: local models are free."""
    paid = set[str]()  # final samples name answers that early stopping may have paid for
    for folder in folders:
        place = run / folder.stage / (folder.part or "")
        samples: list[Sample] = []
        if folder.stage in {"samples", f"{FINAL}/samples"}:
            paths = [path for kind in ("accepted", "rejected") for path in sorted(place.glob(f"*{kind}.jsonl"))]
            samples = [sample for path in paths for sample in read(path, Sample) if sample.key not in paid]
            paid |= {sample.key for sample in samples}
        yield StageCost(
            stage=folder.stage,
            part=folder.part,
            seconds=read_manifest(place)["seconds"],
            dollars=dollars(samples),
        )


def dollars(samples: Iterable[Sample]) -> float:
    """Dollars; the sum itself is of integers."""
    return sum(sample.micro_dollars for sample in samples) / 1_000_000
