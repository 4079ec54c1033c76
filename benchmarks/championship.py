"""The rehearsal of the championship: examples/championship.toml at a small size, all of it, on a machine without cards.

    python benchmarks/championship.py CONTEST BASE OUT [--problems 6] [--test 2] [--pack]

CONTEST holds the contest's train.jsonl and recorded_responses.jsonl (no part of the project), BASE is a model folder,
such as Qwen2.5-Coder-0.5B-Instruct; OUT keeps the run: begun again, it goes on. The recipe is read from examples/, and
what is replaced in it is printed: the base, LoRA rank and counts, addresses, the number of cards, and the number format
that is fast here. The teachers are tests/contest_provider.py, which answers with recorded chains under the limits that
OpenAI and DeepSeek document; the calibration sets come from a hub on this machine, their rows made up; base and members
answer in vLLM.

A problem with four questions or more loses two of them, one with three loses one, before the run sees it: the
questions that the teachers then "write". ``doctor --models`` is asked first as of today, when a teacher is gone, and
then as of November 2024. With ``--pack`` the run is packed, the package installed as its Dockerfile says, and its
answers to the test compared with the run's.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(HERE.parent / "tests"))

from contest_provider import ContestServer  # noqa: E402
from local_hub import NEW, Repos, Server, parquet  # noqa: E402
from replay_server import ANSWERS, QUESTIONS  # noqa: E402

from stepladder import models  # noqa: E402
from stepladder.workspace import write_atomic  # noqa: E402

NAME = "championship"
STAGES = (
    "questions", "samples", "variants", "trainset", "adapter", "merged", "quantised", "predictions", "ensemble",
    "report",
)  # fmt: skip
THEN, KEYS = date(2024, 11, 20), ("OPENAI_API_KEY", "DEEPSEEK_API_KEY")
RULES = [f"第{number}条规则" for number in range(1, 65)]
HUB: Repos = {
    ("llamafactory/alpaca_gpt4_zh", NEW): {
        "alpaca_gpt4_data_zh.json": json.dumps(
            [
                {"instruction": f"用一句话解释{rule}。", "input": "", "output": f"{rule}说明了前提与结论。"}
                for rule in RULES
            ]
        )
    },
    ("vicgalle/alpaca-gpt4", NEW): {
        "data/train-00000-of-00001-6ef3991c06080e14.parquet": parquet(
            [
                {"instruction": f"Explain rule {number}.", "input": "", "output": f"Rule {number} links two facts."}
                for number in range(64)
            ]
        )
    },
    ("anon8231489123/ShareGPT_Vicuna_unfiltered", NEW): {
        "ShareGPT_V3_unfiltered_cleaned_split.json": json.dumps(
            [
                {
                    "id": f"talk-{number}",
                    "conversations": [
                        {"from": "human", "value": f"What follows from rule {number}?"},
                        {"from": "gpt", "value": f"That fact {number + 1} holds."},
                    ],
                }
                for number in range(64)
            ]
        )
    },
}
"""The winning entry's calibration sets by name and form; their rows are made up."""


def replacements(asked: argparse.Namespace, url: str) -> list[tuple[str, str]]:
    """Patterns of the recipe's text and templates of what each becomes; every pattern must occur."""
    quoted = {name: json.dumps(str(path)) for name, path in vars(asked).items() if isinstance(path, Path)}
    return [
        (r'"Qwen/Qwen2.5-32B-Instruct"', quoted["base"]),
        (r"lora_rank = 256", f"lora_rank = {asked.rank}"),
        (r"lora_alpha = 512", f"lora_alpha = {2 * asked.rank}"),
        (r"epochs = 3", f"epochs = {asked.epochs}"),
        (r'(?s)(name = "easy".*?max_tokens =) 2048', rf"\g<1> {asked.max_tokens}"),
        (r"(?s)(\[variants\].*?max_tokens =) 2048", rf"\g<1> {asked.variant_tokens}"),
        (r"(?s)(\[predict\].*?max_tokens =) 2048", rf"\g<1> {asked.max_tokens}"),
        (r"(?m)^samples = 256", "samples = 16"),
        (r"(?m)^samples = 64", "samples = 8"),
        (r"(?m)^max_loss = 0\.03", "max_orders = 2\nmax_loss = 0.03"),
        (r"devices = 4", f"devices = {asked.devices}"),
        (r"group_size = 128", f"group_size = {group_size(asked.base)}"),
        (r'"https://api\.(?:openai|deepseek)\.com/v1"', json.dumps(url)),
        *([] if models.has_avx512() else [(r'(?s)(\[predict\]\s*engine =) "vllm"', r'\g<1> "local"')]),
        (r"(?m)^\[serve\]", f'[serve]\nenvironment = {quoted["environment"]}\ndtype = "{models.dtype_name()}"'),
    ]


def group_size(base: Path) -> int:
    """The largest group size up to 128 that divides the widths of a base's layers."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return max(
        size for size in (16, 32, 64, 128) if not config["hidden_size"] % size | config["intermediate_size"] % size
    )


def recipe(asked: argparse.Namespace, url: str) -> str:
    """The TOML of the rehearsal, after printing how it differs from the example."""
    example = (EXAMPLES / "championship.toml").read_text(encoding="utf-8")
    text = example
    for pattern, replacement in replacements(asked, url):
        text, count = re.subn(pattern, replacement, text)
        if not count:
            sys.exit(
                f"error: examples/championship.toml has no {pattern}; say in benchmarks/championship.py what is new"
            )
    changed = difflib.unified_diff(example.splitlines(), text.splitlines(), lineterm="", n=0)
    print("The recipe, but for")
    for line in changed:
        if line.startswith("+") and not line.startswith("+++"):
            print(f"  {line[1:].split('  #')[0].rstrip()}")
    return text


def split(contest: Path, asked: argparse.Namespace) -> None:
    """Write the questions of the run and those of its test."""
    problems = [json.loads(line) for line in (contest / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    random.Random(2024).shuffle(problems)
    test, train = problems[: asked.test], problems[asked.test : asked.test + asked.problems]
    for problem in train:
        kept = len(problem["questions"]) - max(0, min(2, len(problem["questions"]) - 2))
        problem["questions"] = problem["questions"][:kept]
    (asked.out / "data").mkdir(exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in part)
        (asked.out / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(part)} problems, {sum(len(problem['questions']) for problem in part)} questions")


@contextmanager
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    begun = time.monotonic()
    print(f"\n== {what}", flush=True)
    yield
    seconds[what] = time.monotonic() - begun
    print(f"== {what}: {seconds[what]:.0f} s", flush=True)


def stepladder(out: Path, environment: Mapping[str, str], *command: str, check: bool = True) -> int:
    line = [sys.executable, "-m", "stepladder", *command]
    status = subprocess.run(line, cwd=out, env=environment, check=False).returncode
    if check and status:
        sys.exit(f"stepladder {' '.join(command)} ended with {status}")
    return status


def pack(out: Path, environment: Mapping[str, str], seconds: dict[str, float]) -> None:
    """Pack the run, install the package, let it answer the test, and compare."""
    package, answers = out / "package", out / "package-answers.jsonl"
    shutil.rmtree(package, ignore_errors=True)
    answers.unlink(missing_ok=True)
    with timed("pack", seconds):
        stepladder(out, environment, "pack", "championship.toml", str(package))
    with timed("install", seconds):
        subprocess.run([str(package / "install.sh")], check=True, env=environment)
    with timed("answers from the package", seconds):
        subprocess.run(
            [str(package / "run.sh"), str(out / "data" / "test.jsonl"), str(answers)], check=True, env=environment
        )
    run = out / "runs" / NAME / "ensemble" / "answers.test.jsonl"
    same = answers.read_bytes() == run.read_bytes()
    print(f"the package's answer file is the run's, byte for byte: {same}")
    if not same:
        pairs = zip(letters(run), letters(answers), strict=True)
        print(f"letters that differ: {sum(ours != packed for ours, packed in pairs)} of {len(letters(run))}")


def letters(answers: Path) -> list[str]:
    rows = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
    return [question["answer"] for row in rows for question in row["questions"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", type=Path, help="the folder of the contest's data")
    parser.add_argument("base", type=Path, help="the folder of the base")
    parser.add_argument("out", type=Path, help="the folder that keeps the run")
    parser.add_argument("--environment", type=Path, default=HERE.parent / ".venv-serve", help="vLLM's")
    parser.add_argument("--problems", type=int, default=6, help="to train and to validate on")
    parser.add_argument("--test", type=int, default=2, help="problems held out")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; alpha is twice that")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer of the base or a member")
    parser.add_argument("--variant-tokens", type=int, default=384, help="of a new question, and of a judge's answer")
    parser.add_argument("--devices", type=int, default=2, help="processes that train one member")
    parser.add_argument("--port", type=int, default=18924, help="of the provider: the same, so that a run goes on")
    parser.add_argument("--pack", action="store_true")
    asked = parser.parse_args()
    for name in ("contest", "base", "out", "environment"):
        setattr(asked, name, getattr(asked, name).resolve())
    for path in (asked.contest / QUESTIONS, asked.contest / ANSWERS, asked.base / "config.json"):
        if not path.is_file():
            sys.exit(f"error: {path}: no such file")
    asked.out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(EXAMPLES / "prompts", asked.out / "prompts", dirs_exist_ok=True)
    split(asked.contest, asked)
    environment = (
        os.environ | dict.fromkeys(KEYS, "test-key") | {"HF_HOME": str(asked.out / "hub"), "NO_PROXY": "127.0.0.1"}
    )
    seconds: dict[str, float] = {}
    config = asked.out / "championship.toml"
    with ContestServer(asked.out, asked.contest, date.today(), fixed_port=asked.port) as provider:
        write_atomic(config, recipe(asked, provider.url))
        print(f"\nstepladder doctor --models, as of {provider.today}", flush=True)
        stepladder(asked.out, environment, "doctor", "--models", config.name, check=False)
    with ContestServer(asked.out, asked.contest, THEN, fixed_port=asked.port) as provider, Server(HUB) as hub:
        environment["HF_ENDPOINT"] = hub.url
        print(f"\nstepladder doctor --models, as of {provider.today}", flush=True)
        stepladder(asked.out, environment, "doctor", "--models", config.name, check=False)
        for stage in STAGES:
            with timed(stage, seconds):
                stepladder(asked.out, environment, stage, config.name)
        bill = provider.billing()
        print(
            f"\nthe provider billed ${bill['micro_dollars'] / 1e6:.4f} for {bill['billed']} answers, "
            f"{bill['refused']} requests refused, {bill['duplicates']} billed twice"
        )
    for command in ("run", "ledger", "status"):
        stepladder(asked.out, environment, command, config.name)
    if asked.pack:
        pack(asked.out, environment, seconds)
    print("\nseconds")
    for what, took in seconds.items():
        print(f"  {what:26}{took:7.0f}")
    print(f"  {'in all':26}{sum(seconds.values()):7.0f}")


if __name__ == "__main__":
    main()
