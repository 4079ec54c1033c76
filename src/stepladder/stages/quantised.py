"""quantised: 4-bit weights, and the verdict: what quantising cost on validation, measured before the model may pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepladder import records
from stepladder.config import settings
from stepladder.errors import GateError
from stepladder.mcq.shuffle import rng
from stepladder.records import Example, Question
from stepladder.stages.answers import correct, predict
from stepladder.stages.flow import Context, digest_of, members
from stepladder.training.quantise import quantise
from stepladder.workspace import Artifact, write_atomic

VERDICT = "verdict.json"

parts = members


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    chosen = {"quantise": settings(config.quantise), "predict": settings(config.predict), "seed": config.seed}
    inputs = {
        "merged": digest_of(context, "merged", part),
        "trainset": digest_of(context, "trainset", part),
        "questions": digest_of(context, "questions"),
    }
    return Artifact(context.workspace.path("quantised", part), chosen, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    config = context.config
    examples = records.read(context.input("trainset", part) / "train.jsonl", Example)
    calibration = rng("calibration", config.seed, part).sample(examples, min(config.quantise.samples, len(examples)))
    merged = context.input("merged", part)
    context.progress.update("GPTQ", 0, 1)
    quantise(config.quantise, merged, calibration, config.train.max_length, folder)

    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    before = correct(questions, predict(context, str(part), merged, questions, "validation, merged"))
    after = correct(questions, predict(context, str(part), folder, questions, "validation, 4-bit"))
    n = len(questions)
    loss = (sum(before) - sum(after)) / n
    measured = {
        "merged": sum(before) / n,
        "quantised": sum(after) / n,
        "loss": loss,
        "max_loss": config.quantise.max_loss,
        "passed": loss <= config.quantise.max_loss,
        "n": n,
        "flips": {
            "right_to_wrong": sum(b and not a for b, a in zip(before, after, strict=True)),
            "wrong_to_right": sum(a and not b for b, a in zip(before, after, strict=True)),
        },
        "bytes": {"merged": _weights(merged), "quantised": _weights(folder)},
    }
    if not measured["passed"]:
        raise GateError(
            f"quantised/{part}: validation accuracy fell by {loss:.3f} (from {sum(before)} to {sum(after)} of {n}), "
            f"more than [quantise] max_loss = {config.quantise.max_loss}; raise samples, lower group_size or use 8 bits"
        )
    write_atomic(folder / VERDICT, json.dumps(measured, indent=1) + "\n")


def verdict(context: Context, member: str | None) -> dict[str, Any]:
    """What quantising a member was measured to cost.

    Raises:
        UserError: the member is not quantised yet.
    """
    digest_of(context, "quantised", member)
    written: dict[str, Any] = json.loads((context.input("quantised", member) / VERDICT).read_text(encoding="utf-8"))
    return written


def _weights(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
