"""A hundred thousand labelled problems and a million, from the user's file to the first rung's samples.

    python benchmarks/ingest.py [--sizes 100000 1000000] [--stages questions samples] [--test 0] [--nodes 0]

Each problem is one question of about 400 characters with a worked solution, unlike all others. Every stage runs in a
process of its own. Prints its seconds, questions a second and peak memory at each size, and how much more the larger
size takes: ten times is linear. With ``--test``, so many held-out problems are compared with all of them, of which a
tenth are problems of the file with one name changed. With ``--nodes``, so many Ray nodes of one core each on this
machine do the same once more, and every file of the questions must be the same; Ray is in this Python then (``make
test-cluster``). Prints what the pieces took, one process each.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from overlap import END, NAMES, sentence

TOML = """\
name = "{name}"
language = "en"

[questions]
train = "train.jsonl"
{test}

[[rung]]
name = "worked"
kind = "worked"

[[member]]
name = "a"
{cluster}"""
POLL_SECONDS = 0.2
WORKER = "stepladder.shards.work"


class Piece(NamedTuple):
    """What one process did, seen from outside."""

    function: str
    busy: float
    """Seconds of processor time."""
    mebibytes: float
    """Most resident memory."""


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


def nearly(problem: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A problem with one of its names changed."""
    words = problem["problem"].split(" ")
    words[next(place for place, word in enumerate(words) if word in NAMES)] = dice.choice(NAMES)
    return problem | {"id": f"{problem['id']}-twin", "problem": " ".join(words)}


def write(path: Path, made: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in made)


def run(folder: Path, stage: str, config: str = "run.toml") -> Measured:
    """One stage of the run in ``folder``."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "stepladder", stage, config], cwd=folder)
    with watching() as pieces:
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"stepladder {stage} ended with {child.returncode}")
    report(pieces)
    return Measured(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@contextlib.contextmanager
def watching() -> Iterator[dict[int, Piece]]:
    """The processes of pieces while the block runs, by process id."""
    seen: dict[int, Piece] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(POLL_SECONDS):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, ValueError, IndexError):
                    words = process.cmdline()
                    function = words[words.index(WORKER) + 1]
                    if words[1:3] == ["-m", WORKER]:
                        times = process.cpu_times()
                        memory = process.memory_info().rss / 2**20
                        before = seen.get(process.pid, Piece(function, 0.0, 0.0))
                        seen[process.pid] = Piece(function, times.user + times.system, max(memory, before.mebibytes))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def report(pieces: dict[int, Piece]) -> None:
    """What the pieces took, by what they did."""
    by_function: dict[str, list[Piece]] = {}
    for piece in pieces.values():
        by_function.setdefault(piece.function, []).append(piece)
    for function, done in by_function.items():
        busy = [piece.busy for piece in done]
        memory = max(piece.mebibytes for piece in done)
        times = f"{statistics.median(busy):.1f} s busy (longest {max(busy):.1f})"
        print(f"  {len(done)} pieces of {function}: {times}, at most {memory:,.0f} MiB", flush=True)


def measure(size: int, test: int, stages: list[str], cluster: bool) -> list[Measured]:
    dice = random.Random(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "train.jsonl", problems(size, seed=1))
        twins = (nearly(problem, dice) for problem in itertools.islice(problems(size, seed=1), test // 10))
        unlike = problems(test - test // 10, seed=2)
        write(folder / "test.jsonl", itertools.chain(twins, unlike))
        held_out = 'test = "test.jsonl"' if test else ""
        (folder / "run.toml").write_text(TOML.format(name="ingest", test=held_out, cluster=""), encoding="utf-8")
        found = [run(folder, stage) for stage in stages]
        if cluster:
            text = TOML.format(name="nodes", test=held_out, cluster='[cluster]\nscheduler = "ray"\n')
            (folder / "nodes.toml").write_text(text, encoding="utf-8")
            took = run(folder, "questions", "nodes.toml")
            here, there = (folder / "runs" / run / "questions" for run in ("ingest", "nodes"))
            names = [path.name for path in here.iterdir() if path.name != "manifest.json"]
            differing = filecmp.cmpfiles(here, there, names, shallow=False)[1:]
            twins_found = json.loads((here / "audit.json").read_text())["counts"]
            print(f"{size:,} questions on the nodes: {took.seconds:.1f} s; other files than here: {differing}")
            print(f"  {twins_found}", flush=True)
        return found


@contextlib.contextmanager
def nodes(count: int) -> Iterator[None]:
    """A Ray cluster on this machine of so many nodes of one core, and a head without any."""
    from cluster import NODE, cluster_of_this_machine

    with cluster_of_this_machine() as made:
        for _ in range(count):
            made.add_node(**NODE | {"num_cpus": 1})
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", default=["questions", "samples"])
    parser.add_argument("--test", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=0)
    asked = parser.parse_args()
    small, large = asked.sizes
    with nodes(asked.nodes) if asked.nodes else contextlib.nullcontext():
        found = {size: measure(size, asked.test, asked.stages, asked.nodes > 0) for size in asked.sizes}
    for stage, less, more in zip(asked.stages, found[small], found[large], strict=True):
        for size, took in ((small, less), (large, more)):
            speed = f"{took.seconds:.1f} s ({took.busy:.1f} s busy), {size / took.seconds:,.0f} questions/s"
            print(f"{stage}, {size:,} questions: {speed}, peak {took.mebibytes:,.0f} MiB")
        seconds, memory = more.busy / less.busy, more.mebibytes / less.mebibytes
        print(f"  {large / small:.1f} times the questions: {seconds:.1f} times as busy, {memory:.1f} times the memory")


if __name__ == "__main__":
    main()
