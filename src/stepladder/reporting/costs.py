"""Time and money of each artifact of a run, from its manifests and samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from stepladder.context import FINAL
from stepladder.records import CHARGES, Charge, Sample, read
from stepladder.reporting.content import StageCost
from stepladder.workspace import read_manifest


class Folder(NamedTuple):
    """An artifact of the run: its stage, with the folder that it is in, and its part."""

    stage: str
    part: str | None


def stages(run: Path, folders: Iterable[Folder]) -> Iterator[StageCost]:
    """Recorded time and money of each artifact. Only teachers cost money, those that answer and those that write new
    questions: local models are free. What was paid for answers that were cut off and asked again is in the ledger."""
    paid = set[str]()  # final artifacts name answers that the first ones may have paid for
    for folder in folders:
        place = run / folder.stage / (folder.part or "")
        charged = {row.key: row for row in _charged(folder.stage, place) if row.key not in paid}
        paid |= charged.keys()
        yield StageCost(
            stage=folder.stage,
            part=folder.part,
            seconds=read_manifest(place)["seconds"],
            dollars=dollars(charged.values()),
        )


def _charged(stage: str, place: Path) -> list[Sample] | list[Charge]:
    """The answers of an artifact that may have cost money."""
    match stage.removeprefix(f"{FINAL}/"):
        case "samples":
            paths = [path for kind in ("accepted", "rejected") for path in sorted(place.glob(f"*{kind}.jsonl"))]
            return [sample for path in paths for sample in read(path, Sample)]
        case "variants" if (place / CHARGES).is_file():
            return read(place / CHARGES, Charge)
    return []


def dollars(charged: Iterable[Sample | Charge]) -> float:
    """Dollars; the sum itself is of integers."""
    return sum(row.micro_dollars for row in charged) / 1_000_000
