"""What ``stepladder plan --card cpu`` forecasts of answering on this machine, against what it takes.

    python benchmarks/forecast.py CONFIG [--runs runs] [--pilot 16]
    python benchmarks/forecast.py --published

CONFIG is a finished run with a test. Its best member answers the test with ``stepladder predict`` in a process of its
own, whose seconds and peak (maximum resident set) are held against two forecasts: from what a moment's measuring finds
this machine to do, and from the rate at which the member answered the first few questions before. With
--published, forecasts for cards are held against figures of vLLM that others have published; nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from stepladder.answering import standalone
from stepladder.ask.local.engine import BATCH_SIZE
from stepladder.commands import plan
from stepladder.config import load
from stepladder.context import Context
from stepladder.forecast import capacity, memory, model_shape, published
from stepladder.forecast.datasheets import this_machine
from stepladder.mcq.questionfile import read_problems
from stepladder.progress import Progress
from stepladder.stages.predictions import leader
from stepladder.workspace import Workspace


class Took(NamedTuple):
    """What answering took."""

    seconds: float
    peak: float
    tokens: int


def answer(model: Path, source: Path, folder: Path, context: Context) -> Took:
    """Answer a file in a process of its own."""
    out = folder / f"{source.stem}.answers.jsonl"
    words = [sys.executable, "-m", "stepladder", "predict", str(model), str(source), str(out)]
    begun = time.perf_counter()
    child = subprocess.Popen(words, stdout=sys.stderr)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("predict failed")
    seconds = time.perf_counter() - begun
    how = standalone.read_settings(model, None)
    questions = [q for one in read_problems(source, how.language, labelled=False) for q in one.questions]
    known = standalone.so_far(Path(f"{out}.ledger.sqlite"), model, questions, how)
    return Took(seconds, usage.ru_maxrss * 1024, sum(sum(one.tokens) for one in known))


def print_published() -> None:
    """The published figures as a Markdown table."""
    print("| model | bits | card | published tokens/s | forecast | off | source |\n|---|---|---|---|---|---|---|")
    for figure in published.FIGURES:
        off = published.deviation(figure)
        rate = figure.tokens_per_second
        cells = (figure.model, figure.bits, figure.card, f"{rate:,.0f}", f"{rate * (1 + off):,.0f}")
        print(f"| {' | '.join(map(str, cells))} | {100 * off:+.0f} % | {figure.source} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--pilot", type=int, default=16, help="problems")
    asked = parser.parse_args()
    if asked.published:
        print_published()
        return
    if asked.config is None:
        raise SystemExit("give CONFIG, or --published")
    config = load(asked.config)
    if config.questions.test is None:
        raise SystemExit(f"{asked.config}: no [questions] test")
    context = Context(config, Workspace(asked.runs, config.name), Progress(Console(stderr=True)))
    model = context.input("quantised", leader(context))
    work, shape = plan.work_of(context)._replace(members=1), model_shape.read(model)
    here = this_machine()
    print(f"{here.tflops * 1e3:.0f} GFLOP/s, {here.bandwidth:.0f} GB/s, {here.bytes_each} bytes a number")
    print(f"{work.questions} questions, {work.prompt:.0f} tokens in ({work.read:.0f} new), {work.answer:.0f} out")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = folder / "pilot.jsonl"
        lines = config.questions.test.read_text(encoding="utf-8").splitlines(keepends=True)[: asked.pilot]
        few.write_text("".join(lines), encoding="utf-8")
        pilot = answer(model, few, folder, context)
        rate = pilot.tokens / (pilot.seconds - capacity.EMBEDDED_START_SECONDS)
        whole = answer(model, config.questions.test, folder, context)
    rows = min(BATCH_SIZE, work.questions * work.votes)
    parts = memory.answering(shape, rows, round(work.prompt + work.answer), bytes_each=here.bytes_each or 4)
    off = parts.total / whole.peak - 1
    pieces = {part: round(size / memory.GIB, 2) for part, size in parts._asdict().items() if size}
    print(f"measured: {whole.seconds:.0f} s, {whole.tokens:,} tokens, peak {whole.peak / memory.GIB:.2f} GiB")
    for title, given in (("by measuring the machine", None), (f"at the pilot's {rate:.0f} tokens/s", rate)):
        seconds = capacity.serving(shape, work, here, given).seconds
        print(f"forecast {title}: {seconds:.0f} s ({100 * (seconds / whole.seconds - 1):+.0f} %)")
    print(f"forecast memory {parts.total / memory.GIB:.2f} GiB ({100 * off:+.0f} %): {json.dumps(pieces)}")


if __name__ == "__main__":
    main()
