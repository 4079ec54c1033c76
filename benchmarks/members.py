"""A package's members on vLLM: side by side against one after another, start-up and all.

    python benchmarks/members.py PACKAGE QUESTIONS [--environment .venv-serve] [--dtype bfloat16] [--kv-cache 1]

Each in a process of its own with a ledger of its own, so that every question is asked. The answers are the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from stepladder import predicting
from stepladder.progress import duration

WAYS = {"beside": "side by side", "after": "one after another"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--environment", type=Path, default=Path(".venv-serve"))
    parser.add_argument("--language")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--kv-cache", type=float, default=1.0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        if asked.way == "after":
            predicting.side_by_side = lambda folders, settings: None
        served = {
            "environment": asked.environment, "dtype": asked.dtype, "max_length": asked.max_length,
            "kv_cache_gib": asked.kv_cache,
        }  # fmt: skip
        predicting.predict(
            str(asked.package), asked.questions, asked.out, Console(stderr=True), language=asked.language,
            asked={"engine": "vllm"}, served=served,
        )  # fmt: skip
        return
    with tempfile.TemporaryDirectory() as name:
        seconds, answers = {}, set()
        for way, title in WAYS.items():
            out, begun = Path(name, f"{way}.jsonl"), time.perf_counter()
            words = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--out", str(out)]
            subprocess.run(words, check=True)
            seconds[way] = time.perf_counter() - begun
            answers.add(out.read_bytes())
            print(f"{title:24}{duration(seconds[way]):>14}")
    same = "the same" if len(answers) == 1 else "not the same"
    print(f"{seconds['after'] / seconds['beside']:.2f} times as fast, with {same} answers")


if __name__ == "__main__":
    main()
