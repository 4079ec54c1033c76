"""vLLM started for a command, with the real thing, from the environment that ``make serve-env`` makes.

Left out unless asked for: ``make test-serve``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_serving import altered

from stepladder import models
from stepladder.answering.standalone import read_settings, so_far, write_settings
from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import FREE
from stepladder.ask.request import Request
from stepladder.closedworld.generate import generate, to_line
from stepladder.commands.predict import predict
from stepladder.config import Config, Model, Serve
from stepladder.context import Context
from stepladder.errors import ServeError
from stepladder.mcq.questionfile import read_problems
from stepladder.nodes import THIS_MACHINE
from stepladder.records import Message, Prediction
from stepladder.serving.fleet import Fleet
from stepladder.serving.probe import free_port
from stepladder.stages import flow

SERVE = Serve(
    environment=Path(__file__).parent.parent / ".venv-serve", dtype="float32", kv_cache_gib=1, max_length=1024
)

KILLS = int(os.environ.get("KILLS", "2"))

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


def until_gone(seconds: float = 10) -> set[int]:
    """What is left of all servers after a while."""
    deadline = time.monotonic() + seconds
    while (left := servers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_model_folder_answers_through_vllm_as_it_does_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(models.locate(models.BUNDLED), folder)
    table = {
        "name": "r", "language": "en", "questions": {"train": "t"}, "member": [{"name": "a"}],
        "rung": [{"name": "w", "kind": "worked"}], "predict": {"max_tokens": 24, "dtype": SERVE.dtype},
    }  # fmt: skip
    write_settings(Config.model_validate(table), folder)
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(to_line(record) for record in generate(3, 6, "en", "test")), encoding="utf-8")
    given: dict[str, list[Prediction]] = {}
    own = SERVE.model_dump(exclude_defaults=True)
    questions = [question for one in read_problems(asked, "en", labelled=False) for question in one.questions]
    with Fleet(folder, "there", SERVE, tmp_path / "there") as fleet:
        monkeypatch.setenv("VLLM_API_KEY", fleet.key)
        running = {"base_url": fleet.addresses.read_text().strip(), "model": "there", "dtype": SERVE.dtype}
        predict(
            str(folder), asked, tmp_path / "there.jsonl", Console(file=StringIO()), predict_settings={"engine": "vllm"},
            serve_settings=running,
        )  # fmt: skip
    for engine, served in {"local": {}, "vllm": own}.items():
        out = tmp_path / f"{engine}.jsonl"
        predict(
            str(folder),
            asked,
            out,
            Console(file=StringIO()),
            predict_settings={"engine": engine},
            serve_settings=served,
        )
    for engine in ("local", "vllm", "there"):
        # The greedy answers; what could not be read was then asked for again at a temperature, where every run differs.
        out = tmp_path / f"{engine}.jsonl"
        settings = read_settings(folder, None)
        if engine != "local":  # answers are kept by the number format that they were computed in
            predicts = settings.predict.model_copy(update={"engine": "vllm"})
            settings = settings._replace(predict=predicts, serve=SERVE)
        given[engine] = so_far(Path(f"{out}.ledger.sqlite"), folder, questions, settings)
    assert all(one.texts for some in given.values() for one in some)
    for engine in ("local", "there"):
        same = sum(one.texts == other.texts for one, other in zip(given[engine], given["vllm"], strict=True))
        assert same >= 0.9 * len(questions), engine
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
        found = ask_remote(
            wanted,
            RemoteModel("student", model, key=fleet.key),
            ledger,
            Scope("run", "easy"),
            Listener(note=notes.append),
        )
        killer.join()
        assert all(found[one.key].text for one in wanted)
    assert any("is started again" in note for note in notes)
    assert not servers()


def test_a_rung_s_model_is_served_while_it_is_asked_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the ledger has every answer, those that were cut off among them, no server is started again."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(to_line(record) for record in generate(3, 8, "en", "train"))
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "run.toml").write_text(
        f"""
        name = "run"
        language = "en"
        questions = {{ train = "train.jsonl" }}
        models.own = {{ engine = "vllm" }}
        train = {{ lora_rank = 8 }}
        rung = [{{ name = "easy", models = ["own"], max_tokens = 24 }}, {{ name = "given", kind = "worked" }}]
        member = [{{ name = "a" }}]
        [serve]
        environment = "{SERVE.environment}"
        dtype = "float32"
        kv_cache_gib = 1
        max_length = 360
        """
    )
    context = Context.open(tmp_path / "run.toml", tmp_path / "runs")
    flow.run(context, ("questions", "samples"))
    assert not [pid for pid in servers() if Path(f"/proc/{pid}/cwd").resolve() == tmp_path.resolve()]
    samples, log = context.input("samples"), tmp_path / "runs/run/.serve/server-0.log"
    rejected, said = (samples / "rejected.jsonl").read_bytes(), log.read_bytes()
    with Ledger(context.workspace.ledger, read_only=True) as ledger:
        (account,) = ledger.accounts("run")
    assert account.model == "own"
    assert account.outcomes["truncated"] > 5
    shutil.rmtree(samples)
    flow.run(context, ("samples",))
    assert log.read_bytes() == said  # no server was started
    assert (samples / "rejected.jsonl").read_bytes() == rejected


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_command_leaves_no_server(number: int, tmp_path: Path) -> None:
    """At whatever moment and by whatever signal it ends: while vLLM starts, loads, answers or stops."""
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(to_line(record) for record in generate(3, 40, "en", "test")), encoding="utf-8")
    words = [
        sys.executable, "-m", "stepladder", "predict", str(models.locate(models.BUNDLED)), str(asked),
        str(tmp_path / "out.jsonl"), "--language", "en", "--engine", "vllm", "--environment", str(SERVE.environment),
        "--max-length", "1024", "--kv-cache", "1",
    ]  # fmt: skip
    draw = random.Random(number)
    moment, sent = draw.uniform(2, 60), draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + moment
        most = 0
        while run.poll() is None and time.monotonic() < deadline:
            most = max(most, len(servers()))
            time.sleep(0.1)
        running = run.poll() is None
        run.send_signal(sent)
    print(f"killed after {moment:.0f} s by {sent.name}: {most} processes of vLLM, {'' if running else 'already over'}")
    assert not until_gone()


def test_a_port_that_another_process_takes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, free = other.getsockname()[1], free_port(THIS_MACHINE)
        altered(monkeypatch, *(f"server.free_port = lambda _: {port}" for port in (taken, free)))
        with Fleet(models.locate(models.BUNDLED), "student", SERVE, tmp_path) as fleet:
            assert fleet.addresses.read_text() == f"http://127.0.0.1:{free}/v1\n"
    assert not until_gone()


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    weights = models.locate(models.BUNDLED)
    with pytest.raises(ServeError, match=r"needs about 1000\.8 GiB of memory"):
        Fleet(weights, "student", SERVE.model_copy(update={"kv_cache_gib": 999}), tmp_path).__enter__()
    tight = SERVE.model_copy(update={"max_length": 8192, "kv_cache_gib": 0.05})
    with pytest.raises(ServeError, match=r"keys and values of 8192 tokens do not fit; lower \[serve\] max_length"):
        Fleet(weights, "student", tight, tmp_path).__enter__()
    broken = tmp_path / "broken"
    shutil.copytree(weights, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ServeError, match=r"the vLLM server of .* did not start: \w*(Error|Exception): .*\(see .*log\)"):
        Fleet(broken, "student", SERVE, tmp_path).__enter__()
    assert not until_gone()
