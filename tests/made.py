"""A tiny model, what a run has made, and documents and a question for tests that care about a few of their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder import models
from stepladder.documents import QuantisedForm, TrainsetCard, Verdict
from stepladder.records import Question
from stepladder.workspace import MANIFEST

QUESTION = Question(
    id="q#0",
    problem_id="q",
    problem="p",
    question="Who?",
    options=("one", "two"),
    answer="A",
    language="en",
    source="s",
)


def tiny_model(folder: Path) -> Path:
    """Write a model with random weights and the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


def made_by(run: Path) -> dict[str, bytes]:
    """Questions, trainsets and predictions of a run by their paths, without manifests, which hold times."""
    found = [*run.glob("questions/*"), *run.glob("trainset/*/*.jsonl"), *run.glob("predictions/*/*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in found if file.name != MANIFEST}


def run_file(folder: Path, settings: str) -> Path:
    """The file of a small run with these settings and no questions."""
    (folder / "questions.jsonl").write_text("")
    common = (
        'name = "run"', 'language = "en"', 'questions = { train = "questions.jsonl" }',
        'rung = [{ name = "worked", kind = "worked" }]', 'member = [{ name = "a" }]',
    )  # fmt: skip
    (folder / "run.toml").write_text("\n".join([*common, settings, ""]))
    return folder / "run.toml"


def verdict(**changes: Any) -> Verdict:
    """A member that lost nothing, but for ``changes``."""
    fields = {
        "form": QuantisedForm(repair=None, bits=4, group_size=32, samples=8, layers_in_8_bits=()),
        "dtype": {"trained": "float32", "quantised": "float32", "measured": "float32"},
        "merged": 0.75,
        "quantised": 0.75,
        "intervals": {"merged": (0.5, 1.0), "quantised": (0.5, 1.0)},
        "loss": 0.0,
        "n": 4,
        "flips": {"right_to_wrong": 2, "wrong_to_right": 1, "p": 1.0, "examples": ()},
        "unparsed": {"merged": 0.0, "quantised": 0.25},
        "tokens": {"merged": 9.0, "quantised": 9.5},
        "distance": {"tokens": 90, "kl": 0.0123, "same": 0.97, "largest": 0.5},
        "rounding_kl": 0.0456,
        "bytes": {"merged": 269_000_000, "quantised": 94_000_000},
        "why": (),
        "passed": True,
        "gates": {"max_loss": 0.01, "max_unparsed": 0.05, "max_kl": 0.1},
        "attempts": (),
    }
    return Verdict.model_validate(fields | changes)


def card(**changes: Any) -> TrainsetCard:
    """One example, and nothing left out, but for ``changes``."""
    fields = {
        "examples": 1,
        "questions": 1,
        "problems": 1,
        "tokens": 1234,
        "length": {"median": 1234.0, "p95": 1234.0, "longest": 1234},
        "teachers": {"proof": 1},
        "sources": {"closedworld/ordering/2": 1},
        "letters": {"A": 1},
        "left_out": 0,
        "leaked": 0,
        "other_language": 0,
        "same_chain": 0,
        "duplicates": 0,
        "twins": (),
    }
    return TrainsetCard.model_validate(fields | changes)
