"""What each way to quantise costs a member of a finished run, and what the gate says of sabotaged exports.

    python benchmarks/quantising.py examples/demo.toml [--member full] [--runs runs] [--gptqmodel .venv-swift]

Every form has the run's own bits and group size. Prints for each its KL divergence from the merged weights on the
merged model's answers, accuracy on validation and test, flips and exact McNemar p. Generic text is the licence and the
docs of this repository, cut into pieces. Nothing is asked twice: answers are kept in the run's ledger.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from stepladder import models, records
from stepladder.answering.voting import correct, predict
from stepladder.config import Quantise, load
from stepladder.context import Context
from stepladder.errors import GateError
from stepladder.progress import Progress
from stepladder.quantising import gptq, gptqmodel, repair
from stepladder.quantising.gate import distance, measure, reference
from stepladder.records import Question
from stepladder.stages.quantised import Form, calibration_rows, own_rows
from stepladder.stats import mcnemar
from stepladder.workspace import Workspace

ROOT = Path(__file__).parent.parent
PIECE = 150
"""Tokens of a piece of generic text: about as many as a conversation of the demo has."""


def generic(merged: Path, count: int) -> list[list[int]]:
    tokenizer = models.load_tokenizer(merged)
    pages = (ROOT / "LICENSE", *sorted((ROOT / "docs").rglob("*.md")))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = tokenizer(text)["input_ids"]
    return [ids[at : at + PIECE] for at in range(0, count * PIECE, PIECE)]


def shuffled_scales(folder: Path) -> None:
    """One layer's scales in another order."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in sorted(tensors) if name.endswith("layers.10.mlp.down_proj.weight_scale"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata=metadata)


def wrong_group_size(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["group_size"] *= 2
    path.write_text(json.dumps(config), encoding="utf-8")


def main() -> None:  # noqa: PLR0915 (a list of forms and a loop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--member", default="full")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--gptqmodel", type=Path, help="environment that 'make swift' has made")
    parser.add_argument("--max-loss", type=float, help="instead of the run's own")
    parser.add_argument("--only", default="", help="forms with this in their name, and rounding")
    asked = parser.parse_args()
    config = load(asked.config)
    if asked.max_loss is not None:
        quantise = config.quantise.model_copy(update={"max_loss": asked.max_loss})
        config = config.model_copy(update={"quantise": quantise})
    console = Console()
    context = Context(config, Workspace(asked.runs, config.name), Progress(console))
    merged = context.input("merged", asked.member)
    questions = {
        split: records.read(context.input("questions") / f"{split}.jsonl", Question) for split in ("validation", "test")
    }
    before = reference(context, asked.member, merged, questions["validation"])
    tested = correct(questions["test"], predict(context, asked.member, merged, questions["test"], "test, merged"))
    own = calibration_rows(context, asked.member, Form(config.quantise))
    blanks = [[models.load_tokenizer(merged).encode("\n")[0]] * PIECE] * len(own)
    text = generic(merged, len(own))
    plain = config.quantise.model_copy(update={"method": "rtn"})
    classic = Quantise(backend="gptqmodel", bits=config.quantise.bits, group_size=config.quantise.group_size)
    symmetric = config.quantise.model_copy(update={"symmetric": True})

    def compressed(settings: Quantise, rows: list[list[int]]) -> Callable[[Path], None]:
        return lambda folder: gptq.quantise(settings, merged, rows, folder)

    def recovered(folder: Path) -> None:
        gptq.quantise(plain, merged, [], folder)
        repair.recover(merged, folder, own_rows(context, asked.member, Form(config.quantise)))

    forms: list[tuple[str, Quantise, Callable[[Path], None], Callable[[Path], None] | None]] = [
        ("rounding to nearest", plain, compressed(plain, []), None),
        ("rounding, norms tuned (recovery)", plain, recovered, None),
        ("GPTQ, generic text", config.quantise, compressed(config.quantise, text), None),
        ("GPTQ, own chains", config.quantise, compressed(config.quantise, own), None),
        ("rounding, symmetric", symmetric, compressed(plain.model_copy(update={"symmetric": True}), []), None),
        ("GPTQ, own chains, symmetric", symmetric, compressed(symmetric, own), None),
        ("sabotage: scales of one layer", config.quantise, compressed(config.quantise, own), shuffled_scales),
        ("sabotage: calibrated on blanks", config.quantise, compressed(config.quantise, blanks), None),
        ("sabotage: group size in config", config.quantise, compressed(config.quantise, own), wrong_group_size),
    ]
    if asked.gptqmodel is not None:
        forms.insert(5, (
            "gptqmodel, own chains, symmetric", classic,
            lambda folder: gptqmodel.quantise(classic, asked.gptqmodel, merged, own, folder), None,
        ))  # fmt: skip
    print(f"merged: validation {sum(correct(before.questions, before.answers))}/{len(before.questions)}, ", end="")
    print(f"test {sum(tested)}/{len(tested)}")
    rounding = None
    with tempfile.TemporaryDirectory() as name:
        for title, settings, make, sabotage in forms:
            if asked.only not in title and title != "rounding to nearest":
                continue
            folder = Path(name) / "attempt"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            if sabotage is not None:
                sabotage(folder)
            try:
                gptq.inspect(folder, settings, merged)
            except GateError as error:
                print(f"{title:34} REFUSED: {str(error).partition(': ')[2]}", flush=True)
                continue
            if title in ("rounding to nearest", "rounding, symmetric"):
                rounding = distance(context, before, folder)
            measured = measure(
                context, asked.member, before, folder, None if title.startswith("rounding") else rounding
            )
            right = correct(questions["test"], predict(context, asked.member, folder, questions["test"], "test"))
            flips = mcnemar(tested, right)
            test = measured.accuracy
            loss = f"{test.decision}, {test.loss:+.3f} of {test.answers} answers, p = {test.p:.2g}"
            result = f"REFUSED: {'; '.join(measured.why)}" if measured.why else f"passes ({loss})"
            on_validation = f"validation {measured.quantised * measured.n:.0f}"
            on_test = f"test {sum(right)} (-{flips.lost} +{flips.won}, p = {flips.p:.2g})"
            kl = float("nan") if measured.distance is None else measured.distance.kl
            print(f"{title:34} KL {kl:.4f}  {on_validation}  {on_test}  {result}", flush=True)


if __name__ == "__main__":
    main()
