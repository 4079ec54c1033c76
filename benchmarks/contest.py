"""A real base taught on the contest's own questions, with chains of recorded models: base, tuned and 4 bits, held out.

    python benchmarks/contest.py CONTEST BASE OUT [--test 70] [--epochs 1] [--rank 64]

CONTEST holds the contest's train.jsonl and recorded_responses.jsonl (no part of the project), BASE is a model folder,
OUT keeps the run: begun again, it goes on, as OUT/run.toml says. So many problems are held out for the test before
anything else is done; training problems that are nearly theirs train nobody. The chains are those that the ladder of
tests/replay_server.py accepts. Prints how often each form is right on the test, with intervals, and what became of the
flips.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from replay_server import ANSWERS, KEY_ENV, LADDER, QUESTIONS, ReplayServer, configuration  # noqa: E402

from stepladder.mcq.position import commonest_letters, unread_accuracy  # noqa: E402
from stepladder.records import Prediction, Question, read  # noqa: E402
from stepladder.stats import accuracy_interval, mcnemar  # noqa: E402

NAME = "contest"


def settings(url: str, asked: argparse.Namespace) -> str:
    """The TOML of the run: the ladder of recorded models, then one member trained on all that it accepts."""
    ladder = configuration(NAME, url, asked.out / QUESTIONS, LADDER)
    ladder = ladder.replace("validation = 0.01", f'validation = 0.06\ntest = "{asked.out / "test.jsonl"}"')
    return f"""{ladder}
[train]
base = {json.dumps(str(asked.base))}
lora_rank = {asked.rank}
lora_alpha = {2 * asked.rank}
epochs = {asked.epochs}
learning_rate = 2e-4
gradient_accumulation = 4
max_length = 1024
save_steps = 20

[quantise]
group_size = 32
samples = 64
max_loss = 0.15  # what fifty validation questions can exclude

[predict]
max_tokens = 384
"""


def step(folder: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stepladder", *command], cwd=folder, env=os.environ | {KEY_ENV: "test-key"}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def climb(contest: Path, asked: argparse.Namespace) -> None:
    """Hold problems out and collect the chains of the others."""
    asked.out.mkdir(parents=True, exist_ok=True)
    lines = (contest / QUESTIONS).read_text(encoding="utf-8").splitlines()
    random.Random(2024).shuffle(lines)
    for name, part in (("test.jsonl", lines[: asked.test]), (QUESTIONS, lines[asked.test :])):
        (asked.out / name).write_text("".join(line + "\n" for line in part), encoding="utf-8")
    with ReplayServer(asked.out, contest) as server:
        (asked.out / "run.toml").write_text(settings(server.url, asked), encoding="utf-8")
        for stage in ("questions", "samples"):
            step(asked.out, stage, "run.toml")


def show(run: Path) -> None:
    questions = {q.id: q for q in read(run / "questions" / "test.jsonl", Question)}
    forms = {"base": "base/base", "tuned": "a/merged", "4 bits": "a/quantised"}
    right: dict[str, list[bool]] = {}
    problems = [question.problem_id for question in questions.values()]
    print(f"{len(questions)} questions of {len(set(problems))} problems, which no choice has seen")
    taught = commonest_letters(read(run / "questions" / "train.jsonl", Question))
    print(
        f"naming the letter that is right most often in training: {unread_accuracy(taught, [*questions.values()]):.1%}"
    )
    for form, path in forms.items():
        said = {one.question_id: one for one in read(run / "predictions" / f"{path}.test.jsonl", Prediction)}
        right[form] = [said[one].answer == question.answer for one, question in questions.items()]
        silent = sum(said[one].answer is None for one in questions)
        low, high = accuracy_interval(right[form], problems, seed=0)
        share = sum(right[form]) / len(right[form])
        print(f"{form:7}{sum(right[form]):4} right, {share:6.1%} [{low:.1%}, {high:.1%}], {silent} without a letter")
    for before, after in (("base", "tuned"), ("tuned", "4 bits")):
        lost, won, p = mcnemar(right[before], right[after])
        print(f"{before} -> {after}: {won} won, {lost} lost, exact McNemar p = {p:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", type=Path, help="the folder of the contest's data")
    parser.add_argument("base", type=Path, help="the folder of the base")
    parser.add_argument("out", type=Path, help="the folder that keeps the run")
    parser.add_argument("--test", type=int, default=70, help="problems held out")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank; alpha is twice that")
    asked = parser.parse_args()
    asked.base, asked.out, contest = asked.base.resolve(), asked.out.resolve(), asked.contest.resolve()
    for path in (contest / QUESTIONS, contest / ANSWERS, asked.base / "config.json"):
        if not path.is_file():
            sys.exit(f"error: {path}: no such file")
    if not (asked.out / "runs" / NAME / "samples").exists():
        climb(contest, asked)
    step(asked.out, "run", "run.toml")
    show(asked.out / "runs" / NAME)


if __name__ == "__main__":
    main()
