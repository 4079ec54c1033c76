"""A hundred thousand labelled problems and a million, from the user's file to the first rung's samples.

    python benchmarks/ingest.py [--sizes 100000 1000000] [--stages questions samples] [--test 0]

Each problem is one question of about 400 characters with a worked solution, unlike all others. Every stage runs in a
process of its own. Prints its seconds, questions a second and peak memory at each size, and how much more the larger
size takes: ten times is linear. With ``--test``, so many held-out problems are compared with all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from overlap import END, NAMES, sentence

TOML = """\
name = "ingest"
language = "en"

[questions]
train = "train.jsonl"
{test}

[[rung]]
name = "worked"
kind = "worked"

[[member]]
name = "a"
"""


class Measured(NamedTuple):
    """What one stage took in its own process."""

    seconds: float
    busy: float
    """Seconds of processor time: what it takes on a machine with nothing else to do."""
    mebibytes: float
    """Peak resident memory."""


def problems(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Problems in the format of a run, the same at every call."""
    dice = random.Random(seed)
    for number in range(count):
        facts = " ".join(sentence(dice) for _ in range(4))
        options = dice.sample(NAMES, 4)
        answer = dice.randrange(4)
        asked = {
            "question": f"Who keeps key {number}?",
            "options": options,
            "answer": "ABCD"[answer],
            "worked": f"Key {number} is kept by {options[answer]}.\n{options[answer]}",
        }
        text = f"{facts} {options[answer]} keeps key {number}. {END}"
        yield {"id": f"p{seed}-{number:07}", "problem": text, "questions": [asked]}


def write(path: Path, count: int, seed: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems(count, seed))


def run(folder: Path, stage: str) -> Measured:
    """One stage of the run in ``folder``."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "stepladder", stage, "run.toml"], cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"stepladder {stage} ended with {child.returncode}")
    return Measured(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def measure(size: int, test: int, stages: list[str]) -> list[Measured]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "train.jsonl", size, seed=1)
        write(folder / "test.jsonl", test, seed=2)
        (folder / "run.toml").write_text(TOML.format(test='test = "test.jsonl"' if test else ""), encoding="utf-8")
        return [run(folder, stage) for stage in stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", default=["questions", "samples"])
    parser.add_argument("--test", type=int, default=0)
    asked = parser.parse_args()
    small, large = asked.sizes
    found = {size: measure(size, asked.test, asked.stages) for size in asked.sizes}
    for stage, less, more in zip(asked.stages, found[small], found[large], strict=True):
        for size, took in ((small, less), (large, more)):
            speed = f"{took.seconds:.1f} s ({took.busy:.1f} s busy), {size / took.seconds:,.0f} questions/s"
            print(f"{stage}, {size:,} questions: {speed}, peak {took.mebibytes:,.0f} MiB")
        seconds, memory = more.busy / less.busy, more.mebibytes / less.mebibytes
        print(f"  {large / small:.1f} times the questions: {seconds:.1f} times as busy, {memory:.1f} times the memory")


if __name__ == "__main__":
    main()
