"""A model of a rung with ``engine = "vllm"``: its servers are there while it is asked, and at no other time. A small
program stands for vLLM (test_serving); tests/test_vllm_serving.py does this with the real one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_serving import is_alive, pids, script, settings, until

from stepladder import cli
from stepladder.answering.client import FolderClient
from stepladder.ask.ledger import Ledger
from stepladder.ask.request import Request, Response
from stepladder.config import Serve
from stepladder.errors import ServeError
from stepladder.progress import Progress
from stepladder.records import Message

__all__ = ["settings"]  # a fixture

TOML = """
name = "run"
language = "en"
[questions]
train = "train.jsonl"
validation = 0.05
[serve]
environment = "ENVIRONMENT"
kv_cache_gib = 0.01
startup = 20
[models.own]
engine = "vllm"
path = "student"
[[rung]]
name = "easy"
models = ["own"]
orders = 2
[[rung]]
name = "given"
kind = "worked"
[[member]]
name = "a"
"""


@pytest.fixture
def run(settings: Serve, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A run whose first rung asks a model of its own; returns what runs ``samples``, and gives its exit code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "student")
    question = {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"}
    rows = ({"id": f"p{n:02}", "problem": f"Problem {n:02}.", "questions": [question]} for n in range(12))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(TOML.replace("ENVIRONMENT", str(settings.environment)))
    monkeypatch.setattr(sys, "argv", ["stepladder", "questions", "run.toml"])

    def command() -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert command() == 0
    monkeypatch.setattr(sys, "argv", ["stepladder", "samples", "run.toml"])
    return command


def starts(settings: Serve) -> int:
    path = settings.environment / "bin" / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_rung_s_servers_end_with_it_and_do_not_start_where_the_ledger_has_every_answer(
    run: Callable[[], int], settings: Serve, tmp_path: Path
) -> None:
    assert run() == 0
    assert starts(settings) == 1  # for both rounds of questions
    assert not any(map(is_alive, pids(settings)))
    samples = tmp_path / "runs/run/samples"
    before = (samples / "rejected.jsonl").read_bytes()
    assert before.count(b"\n") > 11  # the server says A whatever the order; those it is right in are asked twice
    with Ledger(tmp_path / "runs/ledger.sqlite", read_only=True) as ledger:
        assert [(account.rung, account.model) for account in ledger.accounts("run")] == [("easy", "own")]
    shutil.rmtree(samples)
    assert run() == 0
    assert starts(settings) == 1
    assert (samples / "rejected.jsonl").read_bytes() == before


def test_a_rung_whose_server_does_not_start_says_why(
    run: Callable[[], int], settings: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    script(settings.environment / "bin", "torch.OutOfMemoryError: CUDA out of memory.")
    assert run() == 2
    assert "did not start: its memory is too small" in capsys.readouterr().err
    assert not any(map(is_alive, pids(settings)))


def test_a_rung_that_is_interrupted_leaves_no_server(run: Callable[[], int], settings: Serve) -> None:
    (settings.environment / "bin" / "together").write_text("1000000")  # so many questions never come
    words = [sys.executable, "-m", "stepladder", "samples", "run.toml"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        try:
            until((settings.environment / "bin" / "asked").exists, 120)
            assert all(map(is_alive, pids(settings)))
            command.send_signal(signal.SIGTERM)
            command.wait(60)
        finally:
            command.kill()
    until(lambda: not any(map(is_alive, pids(settings))))


def test_an_answer_as_long_as_the_model_can_write_is_not_asked_for_again(base: Path, tmp_path: Path) -> None:
    """Twice its cap would go beyond ``[serve] max_length``; servers are not started to hear so."""
    request = Request(model="w", messages=(Message(role="user", content="Count."),), max_tokens=200)
    nowhere = Serve(environment=tmp_path / "nowhere", max_length=1000)

    def ask(prompt_tokens: int) -> Response:
        file = tmp_path / f"{prompt_tokens}.sqlite"
        cut = Response(text="1, 2", finish="length", max_tokens=200, prompt_tokens=prompt_tokens, completion_tokens=200)
        with Ledger(file) as ledger:
            ledger.store("run", [(request, cut)])
        with FolderClient(file, "run", tmp_path, nowhere, "auto", Progress(Console(file=StringIO()))) as client:
            return client.ask(base, [request], "answers", "vllm")[request.key]

    assert ask(601).text == "1, 2"
    with pytest.raises(ServeError, match="no vllm in it"):
        ask(600)
