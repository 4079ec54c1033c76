"""What the decisions of a label audit change: the same training with and without them, in equally many steps.

    python benchmarks/audited.py CONTEST BASE REVIEWED OUT [--steps 300] [--members letters chain] [--seeds 0 1]
                                 [--arms without with]

CONTEST holds the contest's train.jsonl and recorded_responses.jsonl (no part of the project), BASE is the folder of a
small chat model, REVIEWED the decisions, as ``stepladder view`` writes them. Each arm is a run of its own under OUT,
whose chains are the recorded responses: "without" leaves out the labels that the audit disputes, which is what a run
does as long as nobody has decided; "with" goes by the decisions. Begun again, the script goes on; the two arms may be
trained at the same time by two processes that are given one arm each, and compared by a third.

Answers are those to the validation questions of either run, which are the same, whose labels nobody has looked at:
greedy, at most 400 tokens, "forced" where an answer without a letter is made to name one. Differences are in points,
with an interval that resamples problems and the exact McNemar test. "loss" is that of the shortest right recorded
chains of these questions, in nats per token, of a member that learns chains: it tells trainings apart that letters do
not.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fields import CONTEST_ROWS, CONTEST_SETTINGS, SMALL_STEPS, examples, recorded
from learning import answer, difference, loss, own_prompt, right_of

from stepladder import models
from stepladder.config import Train
from stepladder.records import Example, Question, parse_lines, read
from stepladder.training.sequences import pack, tokenise
from stepladder.workspace import write_atomic

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from replay_server import ANSWERS, QUESTIONS

ARMS = ("without", "with")
NAME, CAP = "contest", 400
MEMBERS = {"letters": 'learns = "letters"', "chain": 'chains = 1\nchoose = "shortest"'}
SETTINGS = CONTEST_SETTINGS | SMALL_STEPS


def configuration(base: Path, arm: str, member: str, seed: int, epochs: float) -> str:
    """The TOML of one arm's run with one member."""
    train = "\n".join(f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items())
    return f"""name = "{NAME}"
language = "zh"

[questions]
train = "{QUESTIONS}"
{'reviewed = "reviewed.jsonl"' if arm == "with" else ""}

[[rung]]
name = "recorded"
chains = "chains.jsonl"

[train]
base = {json.dumps(str(base))}
{train}
epochs = {epochs!r}

[[member]]
name = "{member}"
{MEMBERS[member]}
seed = {seed}
"""


def chains(contest: Path) -> str:
    """The recorded responses as the file of a rung with chains; those without a text are none."""
    rows = (
        {"id": row["id"], "chain": text, "model": row["model"]}
        for _, row in parse_lines(contest / ANSWERS)
        for text in row["responses"]
        if text.strip()
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run(folder: Path, *stages: str) -> None:
    for stage in stages:
        done = subprocess.run([sys.executable, "-m", "stepladder", stage, "run.toml"], cwd=folder, check=False)
        if done.returncode:
            sys.exit(done.returncode)


def trained(arguments: argparse.Namespace, arm: str, member: str, seed: int) -> Path:
    """The folder of one arm's run with one member, trained and merged."""
    folder: Path = arguments.out / f"{member}-{arguments.steps}-steps-{seed}-{arm}"
    made = folder / "runs" / NAME
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(arguments.contest / QUESTIONS, folder)
        shutil.copy(arguments.reviewed, folder / "reviewed.jsonl")
        write_atomic(folder / "chains.jsonl", chains(arguments.contest))
        write_atomic(folder / "run.toml", configuration(arguments.base, arm, member, seed, 1.0))
    run(folder, "questions", "samples", "trainset")
    learned = read(made / "trainset" / member / "train.jsonl", Example)
    settings = Train.model_validate(SETTINGS)
    packs = pack(tokenise(models.load_tokenizer(arguments.base), learned, settings.max_length), settings.max_length)
    steps_an_epoch = math.ceil(len(packs) / settings.gradient_accumulation)
    epochs = (arguments.steps - 0.5) / steps_an_epoch  # half a step less, so that no rounding makes it one step more
    write_atomic(folder / "run.toml", configuration(arguments.base, arm, member, seed, epochs))
    print(f"== {folder.name}: {len(learned)} examples, {steps_an_epoch} steps an epoch", flush=True)
    run(folder, "adapter", "merged")
    return made


def measured(arguments: argparse.Namespace, made: Path, member: str, questions: Sequence[Question]) -> dict[str, Any]:
    """A member's answers to the questions and its loss on their chains, kept beside its run."""
    file, weights = made.parent.parent / "measured.json", made / "merged" / member
    if not file.exists():
        found: dict[str, Any] = {"answers": answer(weights, questions, own_prompt, CAP)}
        if "letters" not in MEMBERS[member]:
            by_id = {question.id: question for question in questions}
            samples = [*recorded(arguments.contest, by_id)]
            held_out = examples(CONTEST_ROWS["shortest"], samples, by_id, arguments.base)
            found["loss"] = loss(weights, held_out, SETTINGS["max_length"])
        write_atomic(file, json.dumps(found, ensure_ascii=False))
    return dict(json.loads(file.read_text(encoding="utf-8")))


def compare(arguments: argparse.Namespace, member: str) -> None:
    """Train and ask a member in each arm with each seed, and print how often it is right."""
    pooled = {kind: {arm: list[bool]() for arm in arguments.arms} for kind in ("strict", "forced")}
    questions: list[Question] = []
    for seed in arguments.seeds:
        runs = {arm: trained(arguments, arm, member, seed) for arm in arguments.arms}
        questions = read(next(iter(runs.values())) / "questions" / "validation.jsonl", Question)
        results = {arm: measured(arguments, run, member, questions) for arm, run in runs.items()}
        for arm, result in results.items():
            if "loss" in result:
                print(f"{member}, seed {seed}, {arm}: loss {result['loss']:.4f}", flush=True)
        for kind, by_arm in pooled.items():
            right = {arm: right_of(result, kind, questions) for arm, result in results.items()}
            show(f"{member}, seed {seed}, {kind}", right, questions)
            for arm, values in right.items():
                by_arm[arm] += values
    if len(arguments.seeds) > 1:
        for kind, by_arm in pooled.items():
            show(f"{member}, all seeds, {kind}", by_arm, questions * len(arguments.seeds))


def show(name: str, right: dict[str, list[bool]], questions: list[Question]) -> None:
    """Print how often each arm is right, and the difference between them where both are there."""
    shares = ", ".join(f"{arm} {100 * np.mean(values):.1f} %" for arm, values in right.items())
    gained = f"; {difference(right['without'], right['with'], questions)}" if len(right) == len(ARMS) else ""
    print(f"{name}, {len(questions)} questions: {shares}{gained}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", type=Path)
    parser.add_argument("base", type=lambda text: Path(text).resolve())
    parser.add_argument("reviewed", type=Path)
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of each training")
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=[*MEMBERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    arguments = parser.parse_args()
    for member in arguments.members:
        compare(arguments, member)


if __name__ == "__main__":
    main()
