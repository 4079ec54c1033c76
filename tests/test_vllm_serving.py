"""vLLM started for a command, with the real thing, from the environment that ``make serve-env`` makes.

Left out unless asked for: ``make test-serve``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from stepladder import models
from stepladder.ask.admission import FREE
from stepladder.ask.courier import ask
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.request import Request
from stepladder.closedworld import generate, to_line
from stepladder.config import Config, Model, Serve
from stepladder.predicting import predict
from stepladder.records import Message
from stepladder.serving.vllm import Fleet
from stepladder.stages.answering import keep

SERVE = Serve(
    environment=Path(__file__).parent.parent / ".venv-serve", dtype="float32", kv_cache_gib=1, max_length=1024
)

pytestmark = pytest.mark.vllm


def servers() -> set[int]:
    """vLLM's processes that this one started, by what they call themselves."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "VLLM::" in words or "/bin/vllm" in words:
            found.add(int(path.parent.name))
    return found


def test_a_model_folder_answers_through_vllm_as_it_does_in_this_process(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(models.locate(models.BUNDLED), folder)
    table = {
        "name": "r", "language": "en", "questions": {"train": "t"}, "member": [{"name": "a"}],
        "rung": [{"name": "w", "kind": "worked"}], "predict": {"max_tokens": 24},
    }  # fmt: skip
    keep(Config.model_validate(table), folder)
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(to_line(record) for record in generate(3, 6, "en", "test")), encoding="utf-8")
    given = {}
    for engine in ("local", "vllm"):
        out = tmp_path / f"{engine}.jsonl"
        served = SERVE.model_dump(exclude_defaults=True)
        predict(str(folder), asked, out, Console(file=StringIO()), asked={"engine": engine}, served=served)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        given[engine] = [answer["answer"] for row in rows for answer in row["questions"]]
    assert len(given["local"]) == len(given["vllm"])
    same = sum(one == other for one, other in zip(given["local"], given["vllm"], strict=True))
    assert same >= 0.9 * len(given["local"])
    assert not servers()


def test_a_server_that_is_killed_in_the_middle_costs_nothing_but_time(tmp_path: Path, ledger: Ledger) -> None:
    weights = models.locate(models.BUNDLED)
    notes: list[str] = []
    wanted = [
        Request(model="w", messages=(Message(role="user", content=f"Count from {n}."),), max_tokens=64, final=True)
        for n in range(60)
    ]
    with Fleet(weights, "student", SERVE, tmp_path, notes.append) as fleet:
        victims = servers()

        def kill() -> None:
            time.sleep(3)
            os.kill(max(victims), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        model = Model(engine="openai", base_url_file=fleet.addresses, model="student", path=str(weights), price=FREE)
        found = ask(wanted, "student", model, ledger, Scope("run", "easy"), note=notes.append)
        killer.join()
        assert all(found[one.key].text for one in wanted)
    assert any("is started again" in note for note in notes)
    assert not servers()
