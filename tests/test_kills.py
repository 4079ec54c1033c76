"""Every command that writes, killed at random moments and started again, ends with the files of one never killed.

``KILLS=20 pytest tests/test_kills.py`` kills each so often, and the whole run of stages too, on the real small model.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from replay_server import ANSWERS, KEY_ENV, QUESTIONS, ReplayServer, configuration
from test_pipeline import files, same_up_to_rounding
from tiny_run import TOML

from stepladder.closedworld.generate import generate, to_line

KILLS = int(os.environ.get("KILLS", "1"))
PROBLEMS = 60
LADDER = {"easy": ("qwen2-7b",), "medium": ("qwen2-72b", "deepseek-coder-v2"), "hard": ("llama-405b",)}
SAID = ("Qwen2-7B-Instruct", "Qwen2-72B-Instruct", "DeepSeek-Coder-V2-Instruct", "Meta-Llama-3.1-405B-Instruct-FP8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayServer]:
    """Sixty questions; each model knows more of them than the one before, and two contradict a label together."""
    folder = tmp_path_factory.mktemp("kills")
    asked = {"question": "谁高？", "options": ["甲", "乙"], "answer": "A"}
    problems = [{"id": f"p{n:02}", "problem": f"第{n}题：甲比乙高。", "questions": [asked]} for n in range(PROBLEMS)]
    rows = [
        {"model": model, "id": f"p{n:02}#0", "responses": [f"第{n}题，甲比乙高。\n答案是：{'A' if n % 9 else 'B'}"]}
        for at, model in enumerate(SAID)
        for n in range(20 + 13 * at)
    ]
    for name, lines in ((QUESTIONS, problems), (ANSWERS, rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with ReplayServer(folder, folder) as running:
        yield running


def project(folder: Path, server: ReplayServer) -> Path:
    """A folder in which every command can run."""
    folder.mkdir()
    toml = configuration("run", server.url, server.contest / QUESTIONS, LADDER)
    (folder / "run.toml").write_text(toml, encoding="utf-8")
    (folder / "tiny.toml").write_text(TOML, encoding="utf-8")
    for split, problems in (("train", 5), ("test", 2)):
        text = "".join(map(to_line, generate(2024, problems, "en", split)))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    votes = ({"id": f"q{n}", "gold": "A", "votes": {m: ["AB"[n % 7 == 0]] for m in "xyz"}} for n in range(500))
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in votes))
    table = ({"question": f"q{n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(5000))
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


COMMANDS: list[tuple[str, ...]] = [
    ("import", "table.jsonl", "out.jsonl"),
    ("audit", "--votes", "votes.jsonl", "--out", "audit.jsonl"),
    ("worlds", "worlds.jsonl", "--problems", "8"),
    ("init", "new"),
    ("questions", "run.toml"),
    ("plan", "run.toml", "--pilot", "30"),
    ("samples", "run.toml"),
    ("ledger", "run.toml", "--export", "export.jsonl"),
]
"""In the order of the flow: each finds what those before it left."""


def start(folder: Path, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = os.environ | {KEY_ENV: "test-key"}
    words = [sys.executable, "-m", "stepladder", *command]
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, command: tuple[str, ...]) -> float:
    """Run a command to its end; the seconds it took."""
    began = time.monotonic()
    with start(folder, command) as child:
        _, said = child.communicate()
    assert child.returncode == 0, (command, said.decode())
    return time.monotonic() - began


def kill(folder: Path, command: tuple[str, ...], after: float) -> bool:
    """Whether the command was killed before it ended by itself."""
    with start(folder, command) as child:
        try:
            child.wait(after)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
    return child.returncode == -signal.SIGKILL


def everything(folder: Path) -> dict[str, str]:
    """All files but the ledger, whose attempts tell of the kills, and what it exports of them."""
    return {
        name: hashed
        for name, hashed in files(folder).items()
        if "ledger" not in name and not name.endswith("export.jsonl")
    }


def test_every_command_killed_and_started_again_ends_with_the_same_files(server: ReplayServer, tmp_path: Path) -> None:
    whole, killed = (project(tmp_path / name, server) for name in ("whole", "killed"))
    dice = random.Random(2024)
    for command in COMMANDS:
        took = finish(whole, command)
        for _ in range(KILLS):
            kill(killed, command, dice.uniform(0.3, 1.0) * took)
        finish(killed, command)
        assert everything(killed) == everything(whole), command


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes many minutes; set KILLS=20 for it")
def test_a_whole_run_killed_and_started_again_ends_with_the_same_files(server: ReplayServer, tmp_path: Path) -> None:
    whole, killed = (project(tmp_path / name, server) for name in ("whole", "killed"))
    took = finish(whole, ("run", "tiny.toml"))
    dice = random.Random(7)
    kills = sum(kill(killed, ("run", "tiny.toml"), dice.uniform(1.0, 0.4 * took)) for _ in range(KILLS))
    assert kills
    finish(killed, ("run", "tiny.toml"))
    one, other = everything(killed), everything(whole)
    assert one.keys() == other.keys()
    for name in (name for name in one if one[name] != other[name]):
        assert same_up_to_rounding(killed / name, whole / name), name
