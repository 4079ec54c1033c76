"""Servers that are started, watched and stopped. Here a small program stands for vLLM: it says the same to everybody,
and like vLLM it starts a process in a session of its own. tests/test_vllm_serving.py does this with the real one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pynvml
import pytest
from jinja2 import Environment, PackageLoader
from made import run_file
from rich.console import Console

from stepladder import models
from stepladder.answering import team
from stepladder.answering.client import FolderClient
from stepladder.answering.team import Team
from stepladder.ask.request import Request
from stepladder.closedworld.generate import generate, to_line
from stepladder.commands.predict import predict
from stepladder.config import Cluster, Config, Serve
from stepladder.context import Context
from stepladder.errors import ModelError, ServeError, UserError
from stepladder.nodes import THIS_MACHINE
from stepladder.progress import Progress
from stepladder.records import Message, Prediction, Question
from stepladder.serving import cards
from stepladder.serving import fleet as fleets
from stepladder.serving.cards import cards_by_server, side_by_side_settings, visible_cards
from stepladder.serving.fleet import Fleet
from stepladder.serving.probe import free_port, is_healthy, is_ours
from stepladder.serving.vllm import server_command, server_environment
from stepladder.stages import adapter, flow

PROGRAM = """#!{python}
import http.server, json, os, signal, subprocess, sys, time
from hashlib import sha256
from pathlib import Path
folder = Path(__file__).parent
with (folder / "starts").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
script = (folder / "script").read_text().split("\\n")
says = script[min(len((folder / "starts").read_text().splitlines()), len(script)) - 1]
if says:
    sys.exit(says)
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
if (folder / "stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "environment").write_text(json.dumps({{**os.environ}}))
if (folder / "open").exists():
    del os.environ["VLLM_API_KEY"]
(folder / f"pids-{{os.getpid()}}").write_text(f"{{os.getpid()}} {{child.pid}}")
says = Path(sys.argv[2], "says")
text = says.read_text() if says.exists() else "Answer: A"
said = {{"message": {{"role": "assistant", "content": text}}, "finish_reason": "stop", "index": 0}}
arrived = []
def number(name):
    return int((folder / name).read_text()) if (folder / name).exists() else 0
listed = {{"data": [{{"id": "student"}}]}}
pages = {{"/health": {{}}, "/v1/models": listed, "/v1/chat/completions": {{"choices": [said]}}}}
def answer(prompt):  # of two letters, by what is asked, where there is a file "varied"
    return f"Answer: {{'AB'[sha256(str(prompt).encode()).digest()[0] % 2]}}" if (folder / "varied").exists() else text
def stream(prompts):
    for index, prompt in enumerate(prompts):
        choice = {{"index": index, "text": answer(prompt), "finish_reason": "stop"}}
        usage = {{"prompt_tokens": 5, "completion_tokens": 5}}
        yield b"data: " + json.dumps({{"choices": [choice], "usage": usage}}).encode() + b"\\n\\n"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        prompts = json.loads(asked)["prompt"] if self.path == "/v1/completions" else []
        arrived.extend(prompts)
        if prompts:
            (folder / "asked").touch()
        chat = self.path == "/v1/chat/completions" and b"Bob sits left of Cleo" not in asked  # which the probe holds
        while (prompts or chat) and len(arrived) < number("together"):
            time.sleep(0.05)
        time.sleep(number("milliseconds") / 1000 if prompts or chat else 0)
        while self.path == "/health" and len((folder / "starts").read_text().splitlines()) < number("servers"):
            time.sleep(0.05)
        key = "Bearer " + os.environ.get("VLLM_API_KEY", "")
        known = not self.path.startswith("/v1") or key in ("Bearer ", self.headers.get("Authorization"))
        if chat:
            page = {{"choices": [said | {{"message": {{"role": "assistant", "content": answer(asked)}}}}]}}
        body = b"".join(stream(prompts)) or json.dumps(page if chat else pages.get(self.path)).encode()
        self.send_response(401 if not known else 200 if prompts or self.path in pages else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *_):
        pass
given = dict(zip(sys.argv, sys.argv[1:]))
(folder / "generation").write_text(Path(given["--generation-config"], "generation_config.json").read_text())
http.server.ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""
ALTERED = """
import sys
from stepladder.serving import server
{change}
sys.exit(server.run(server.ServerJob.model_validate_json(sys.argv[1])))
"""
"""A server's process of which something is changed."""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """An environment with the stand-in, on a machine without cards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = stand_in(tmp_path / "env")
    return Serve(environment=folder.parent, startup=20, kv_cache_gib=0.01)


def stand_in(environment: Path) -> Path:
    """Make an environment with the stand-in for vLLM, whose starts all stay; returns its folder of programs."""
    folder = environment / "bin"
    folder.mkdir(parents=True)
    (folder / "vllm").write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
    (folder / "vllm").chmod(0o755)
    script(folder, "")
    return folder


def script(folder: Path, *lines: str) -> None:
    """What the first start says before it ends, the second, and so on; an empty line is a start that stays."""
    (folder / "script").write_text("\n".join(lines), encoding="utf-8")


def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_p": 0.8, "temperature": 0.7}')
    return folder


def fleet(settings: Serve, tmp_path: Path, notes: list[str] | None = None) -> Fleet:
    return Fleet(
        weights(tmp_path), "student", settings, tmp_path / "serve", (notes if notes is not None else []).append
    )


def altered(monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
    """Change something in the process of the first server that starts, of the second, and so on."""
    codes = iter([ALTERED.format(change=change) for change in changes])
    monkeypatch.setattr(fleets, "command", lambda job: [sys.executable, "-c", next(codes), job.model_dump_json()])


def pids(settings: Serve) -> list[int]:
    found = settings.environment.glob("bin/pids-*")
    return [int(pid) for path in found for pid in path.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_is_there_while_the_block_lasts(settings: Serve, tmp_path: Path) -> None:
    with fleet(settings, tmp_path) as running:
        (url,) = running.addresses.read_text().split()
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health") as reply:  # noqa: S310
            assert reply.status == 200
        started = pids(settings)
        assert len(started) == 2
        assert all(map(is_alive, started))
    assert not any(map(is_alive, started))


def test_a_desk_keeps_a_model_s_server_from_one_round_to_the_next(settings: Serve, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(models.locate(models.BUNDLED))
    starts = settings.environment / "bin" / "starts"
    rounds = [models.locate(models.BUNDLED), models.locate(models.BUNDLED), other]
    console = Console(file=StringIO())
    with FolderClient(
        tmp_path / "ledger.sqlite", "run", tmp_path / "scratch", settings, "auto", Progress(console)
    ) as client:
        for number, folder in enumerate(rounds):
            message = Message(role="user", content=f"Question {number}?")
            request = Request(model=str(folder), messages=(message,), max_tokens=8)
            for _ in range(2):  # the second time, the ledger knows
                found = client.ask(folder, [request], "answers", "vllm")
                assert found[request.key].text == "Answer: A"
            assert sum(map(is_alive, pids(settings))) == 2  # a server and its engine
    assert [line.split()[1] for line in starts.read_text().splitlines()] == [str(rounds[0]), str(other)]
    assert not any(map(is_alive, pids(settings)))


def test_a_server_wants_a_key_that_only_its_environment_holds(
    settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "paid for")
    monkeypatch.setenv("MY_TEACHER", "paid for")
    monkeypatch.setenv("VLLM_API_KEY", "somebody else's")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there
    with fleet(settings, tmp_path) as running:
        url = running.addresses.read_text().strip()
        words = (settings.environment / "bin" / "starts").read_text()
        environment = json.loads((settings.environment / "bin" / "environment").read_text())
        assert running.key not in words
        assert environment["VLLM_API_KEY"] == running.key
        assert "paid for" not in environment.values()
        assert not {"HTTP_PROXY", "MY_TEACHER"} & environment.keys()
        assert "--host 127.0.0.1" in words
        assert "--load-format safetensors" in words
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/models")
    assert fleet(settings, tmp_path).key != running.key


def test_a_server_that_lets_everybody_in_is_not_used(settings: Serve, tmp_path: Path) -> None:
    (settings.environment / "bin" / "open").touch()
    with pytest.raises(ServeError, match="does not ask for its key; update vLLM"), fleet(settings, tmp_path):
        pass
    assert not any(map(is_alive, pids(settings)))


def test_whoever_took_the_port_first_is_not_taken_for_the_server(
    settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = PROGRAM.format(python=sys.executable).partition("\n")[2]
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "vllm").write_text(code, encoding="utf-8")
    script(stranger, "")
    port, other = free_port(THIS_MACHINE), free_port(THIS_MACHINE)
    altered(monkeypatch, *(f"server.free_port = lambda _: {number}" for number in (port, other)))
    own = ["--host", THIS_MACHINE, "--port", str(port), "--generation-config", str(weights(tmp_path))]
    words = [sys.executable, str(stranger / "vllm"), str(tmp_path), *own]
    with subprocess.Popen(words, env=os.environ | {"VLLM_API_KEY": "theirs"}) as process:
        try:
            until(lambda: is_healthy(THIS_MACHINE, port))
            assert is_ours(process.pid, port)
            assert not is_ours(os.getppid(), other)
            with fleet(settings, tmp_path) as running:
                assert running.addresses.read_text() == f"http://127.0.0.1:{other}/v1\n"
        finally:
            process.kill()
            for pid in (int(pid) for path in stranger.glob("pids-*") for pid in path.read_text().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_weights_that_bring_code_are_not_served(settings: Serve, tmp_path: Path) -> None:
    (weights(tmp_path) / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(ModelError, match=r"its own code \(auto_map\), which vLLM may run"), fleet(settings, tmp_path):
        pass
    assert not (settings.environment / "bin" / "starts").exists()


def members(base: Path, folder: Path, **says: str) -> dict[str, Path]:
    """A package's members, each of which says one thing."""
    found = {name: folder / "model" / name for name in says}
    for name, path in found.items():
        shutil.copytree(base, path)
        (path / "says").write_text(says[name], encoding="utf-8")
        settings = path / "generation_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"who": name}), encoding="utf-8")
    known = {
        name: [Prediction(question_id="q", member=name, votes=("A",), answer="A", texts=("",))] * 3 for name in says
    }
    question = Question(
        id="q", problem_id="p", problem="", question="", options=("x", "y"), answer="A", language="en", source="s"
    )
    team.write(folder, Team(found, "vote", "a", team.validation_answers([question] * 3, known)))
    return found


def asked_of(
    settings: Serve,
    folder: Path,
    minutes: float | None = None,
    problems: int = 3,
    url: str | None = None,
    cluster: Cluster | None = None,
) -> tuple[set[str], str]:
    """The letters that a package gives through servers, and what is said meanwhile."""
    questions, out, screen = folder / "questions.jsonl", folder / "out.jsonl", StringIO()
    questions.write_text("".join(to_line(record) for record in generate(3, problems, "en", "test")), encoding="utf-8")
    own = settings.model_dump(include={"environment", "kv_cache_gib", "startup"})
    served = own if url is None else {"base_url": url}
    console = Console(file=screen, width=300)
    predict(
        str(folder),
        questions,
        out,
        console,
        language="en",
        predict_settings={"engine": "vllm"},
        serve_settings=served,
        minutes=minutes,
        cluster=cluster,
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {question["answer"] for row in rows for question in row["questions"]}, screen.getvalue()


def test_a_running_server_that_hangs_is_not_waited_for_either(
    settings: Serve, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members(base, tmp_path, a="Answer: B")
    (settings.environment / "bin" / "together").write_text("1000000")
    with fleet(settings, tmp_path) as running:
        monkeypatch.setenv("VLLM_API_KEY", running.key)
        begun = time.monotonic()
        letters, said = asked_of(settings, tmp_path, minutes=0.15, url=running.addresses.read_text().strip())
        assert time.monotonic() - begun < 25
        assert letters == {"A"}
        assert "Time is up" in said


GIB_32 = SimpleNamespace(total=32768 * 2**20, free=32000 * 2**20)


def with_cards(
    monkeypatch: pytest.MonkeyPatch,
    *memories: SimpleNamespace | pynvml.NVMLError,
    programs: dict[int, list[tuple[int, int | None]]] | None = None,
) -> None:
    """A machine whose driver reports these cards, or fails where it is asked for the memory of one, and names these
    programs on them, each with its bytes."""

    def memory_info(index: int) -> SimpleNamespace:
        if isinstance(memory := memories[index], pynvml.NVMLError):
            raise memory
        return memory

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(memories))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory_info)

    def running(index: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in (programs or {}).get(index, [])]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", running)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_cards_that_other_programs_hold_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held = SimpleNamespace(total=32768 * 2**20, free=2048 * 2**20)
    with_cards(monkeypatch, GIB_32, held, held, pynvml.NVMLError_NotSupported())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,3")
    assert cards.taken() == ["card 2: 30.0 of 32.0 GiB are held by other programs"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as own:
        try:
            programs: dict[int, list[tuple[int, int | None]]] = {2: [(1, 20 * 2**30), (own.pid, 6 * 2**30)]}
            with_cards(monkeypatch, GIB_32, held, held, programs=programs | {1: [(2**22 + 1, None)]})
            card_1, card_2 = cards.taken()
        finally:
            own.kill()
    assert card_1 == "card 1: 30.0 of 32.0 GiB are held by process 4194305"
    name = psutil.Process(1).name()
    assert card_2 == f"card 2: 24.0 of 32.0 GiB are held by process 1 ({name})"


def test_servers_start_on_the_cards_that_are_free(
    settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are those whose share of ``utilisation`` is free: vLLM does not start on others."""
    held = SimpleNamespace(total=32768 * 2**20, free=16384 * 2**20)
    with_cards(monkeypatch, held, GIB_32, held, GIB_32)
    assert cards_by_server(Serve()) == [("1",), ("3",)]
    assert cards_by_server(Serve(tensor_parallel=2)) == [("1", "3")]
    assert cards_by_server(Serve(utilisation=0.5)) == [("0",), ("1",), ("2",), ("3",)]
    with pytest.raises(ServeError, match=r"of 3 of the 4 cards, and 2 have it free; .*card 0: 16.0 of 32.0 GiB are"):
        cards_by_server(Serve(tensor_parallel=3))
    notes: list[str] = []
    with fleet(settings, tmp_path, notes) as running:
        assert len(running.addresses.read_text().split()) == 2
        environment = json.loads((settings.environment / "bin" / "environment").read_text())
    assert environment["CUDA_VISIBLE_DEVICES"] in ("1", "3")
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert notes == [f"card {n}: 16.0 of 32.0 GiB are held by other programs, so it is left out" for n in (0, 2)]


def test_amd_cards_are_counted(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes that have compute units; the first is the processor."""
    for node, units in enumerate((0, 304, 304)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"cpu_cores_count 0\nsimd_count {units}\nmem_banks_count 1\n")
    with_cards(monkeypatch)
    monkeypatch.setattr(cards, "AMD_TOPOLOGY", tmp_path)
    assert cards_by_server(Serve()) == [("0",), ("1",)]
    assert side_by_side_settings([base], Serve()) is None  # their memory is not known
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert cards_by_server(Serve()) == [("1",)]


def test_training_does_not_begin_on_a_card_that_others_hold(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = SimpleNamespace(total=32768 * 2**20, free=1024 * 2**20)
    monkeypatch.setattr(models, "has_cuda", lambda: True)
    table = {
        "name": "r", "language": "en", "questions": {"train": "t"}, "member": [{"name": "a"}],
        "rung": [{"name": "w", "kind": "worked"}], "train": {"base": str(base), "lora_rank": 8},
    }  # fmt: skip
    context = cast(Context, SimpleNamespace(config=Config.model_validate(table)))
    with_cards(monkeypatch, held, programs={0: [(1, 30 * 2**30)]})
    with pytest.raises(
        UserError, match=r"needs about 1\.\d GiB of each card, and 1\.0 GiB are free: card 0: .* process 1 "
    ):
        adapter._check_cards(context, base)
    with_cards(monkeypatch, SimpleNamespace(total=32768 * 2**20, free=8192 * 2**20))
    adapter._check_cards(context, base)  # enough is left


def test_a_model_in_this_process_gives_its_card_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before servers start and after the last question; the card is made up."""
    import torch

    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("all"))
    client = FolderClient(
        tmp_path / "ledger.sqlite", "run", tmp_path, Serve(), "auto", Progress(Console(file=StringIO()))
    )
    with client:
        client._load(base)
        assert given_back == []
    assert given_back == ["all"]


def test_members_are_served_side_by_side_where_they_fit(
    settings: Serve, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cards(monkeypatch, GIB_32)
    members(base, tmp_path, a="Answer: A", b="Answer: B", c="Answer: B")
    (settings.environment / "bin" / "servers").write_text("3")  # nobody is healthy before all have started
    letters, _ = asked_of(settings, tmp_path)
    assert letters == {"B"}
    assert not any(map(is_alive, pids(settings)))


def test_a_server_that_was_started_for_it_is_asked_everything_at_once(
    settings: Serve, base: Path, tmp_path: Path
) -> None:
    members(base, tmp_path, a="Answer: B")
    (settings.environment / "bin" / "together").write_text("60")  # nothing is answered before so many are there
    letters, said = asked_of(settings, tmp_path, minutes=2, problems=20)
    assert letters == {"B"}
    assert "Time is up" not in said


def test_members_that_cannot_stand_side_by_side_follow_one_another(
    settings: Serve, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cards(monkeypatch, GIB_32)
    members(base, tmp_path, a="Answer: A", b="Answer: B", c="Answer: B")
    script(settings.environment / "bin", "torch.OutOfMemoryError: CUDA out of memory.", "")
    letters, said = asked_of(settings, tmp_path)
    assert letters == {"B"}
    assert "now one after the other" in said


def test_a_server_that_hangs_is_not_waited_for_when_the_time_is_up(
    settings: Serve, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cards(monkeypatch, GIB_32)
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        members(base, folder, **dict(list({"a": "Answer: B", "b": "Answer: B"}.items())[:count]))
        (settings.environment / "bin" / "together").write_text("1000000")  # so many questions never come
        begun = time.monotonic()
        letters, said = asked_of(settings, folder, minutes=0.15)
        assert time.monotonic() - begun < 25  # and not the ten minutes that an answer may take
        assert letters == {"A"}
        assert "Time is up" in said
        assert not any(map(is_alive, pids(settings)))


def test_what_fits_side_by_side(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [base, base]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert side_by_side_settings(two, Serve()) is None
    with_cards(monkeypatch, GIB_32)
    found = side_by_side_settings(two, Serve())
    assert found is not None
    assert found.utilisation == 0.46
    assert found.kv_cache_gib == pytest.approx(32 * 0.92 / 2 - 1.5, abs=0.05)  # the weights are next to nothing
    assert side_by_side_settings(two, Serve(kv_cache_gib=4)) == Serve(kv_cache_gib=4, utilisation=0.46)
    assert side_by_side_settings([base] * 20, Serve()) is None  # nothing is left beside twenty servers
    assert side_by_side_settings(two, Serve(kv_cache_gib=14)) is None
    with_cards(monkeypatch, GIB_32, SimpleNamespace(total=16 * 2**30, free=16 * 2**30))
    smallest = side_by_side_settings(two, Serve())
    assert smallest is not None
    assert smallest.kv_cache_gib == pytest.approx(16 * 0.92 / 2 - 1.5, abs=0.05)


def test_a_card_that_does_not_report_its_memory_is_used_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, GIB_32, pynvml.NVMLError_NotSupported())
    assert visible_cards() == ["0", "1"]
    assert side_by_side_settings([base, base], Serve()) is None


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded])
def test_without_a_driver_there_is_no_card(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    with_cards(monkeypatch, GIB_32)
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert visible_cards() == []
    assert cards_by_server(Serve()) == [()]


def test_a_driver_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, GIB_32, pynvml.NVMLError_GpuIsLost())
    assert visible_cards() == []


def test_the_command_line_does_not_wait_for_the_driver() -> None:
    code = "import stepladder.cli, stepladder.serving.fleet, sys; sys.exit('pynvml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_that_dies_is_started_again_under_a_new_address(settings: Serve, tmp_path: Path) -> None:
    notes: list[str] = []
    with fleet(settings, tmp_path, notes) as running:
        before = running.addresses.read_text()
        first = pids(settings)
        os.kill(first[0], signal.SIGKILL)
        until(lambda: running.addresses.read_text() not in ("", before))
        assert not any(map(is_alive, first))
        assert "is started again" in notes[0]
        assert running.failure is None


def test_one_that_dies_too_often_is_given_up(settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "MAX_RESTARTS", 0)
    with fleet(settings, tmp_path) as running:
        os.kill(pids(settings)[0], signal.SIGKILL)
        until(lambda: running.failure)
        assert "ended" in str(running.failure)
        # Whoever asks finds nobody, rather than waiting for ever.
        (url,) = running.addresses.read_text().split()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{url}/models")  # noqa: S310


def test_a_taken_port_is_left_to_who_has_it(settings: Serve, tmp_path: Path) -> None:
    script(settings.environment / "bin", "OSError: [Errno 98] Address already in use", "")
    with fleet(settings, tmp_path) as running:
        assert running.addresses.read_text()
    starts = (settings.environment / "bin" / "starts").read_text().splitlines()
    ports = [words.split()[words.split().index("--port") + 1] for words in starts]
    assert len(set(ports)) == 2


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("ValueError: 1.0 GiB KV cache is needed, which is larger than the available KV cache memory", r"max_length"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "its memory is too small"),
        ("(EngineCore pid=7) ValueError: no such architecture", "ValueError: no such architecture"),
        ("something else", "its log gives no reason"),
    ],
)
def test_one_that_does_not_start_says_why(settings: Serve, tmp_path: Path, said: str, why: str) -> None:
    script(settings.environment / "bin", said)
    with pytest.raises(ServeError, match=f"did not start: .*{why}.*see .*server-0.log"), fleet(settings, tmp_path):
        pass


def test_one_that_takes_too_long_is_stopped(settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, "server.is_healthy = lambda *_: False")
    slow = settings.model_copy(update={"startup": 0.8})
    with pytest.raises(ServeError, match=r"did not start: it was not healthy within 0.8 s"), fleet(slow, tmp_path):
        pass
    assert not any(map(is_alive, pids(settings)))


def test_what_is_missing_is_said_before_anything_starts(settings: Serve, tmp_path: Path) -> None:
    nowhere = settings.model_copy(update={"environment": tmp_path / "nowhere"})
    with pytest.raises(ServeError, match="no vllm in it; run 'make serve-env'"), fleet(nowhere, tmp_path):
        pass
    large = settings.model_copy(update={"kv_cache_gib": 1e6})
    with pytest.raises(ServeError, match=r"GiB of memory and .* are free"), fleet(large, tmp_path):
        pass


def test_4_bit_weights_are_not_given_to_a_cpu_without_kernels_for_them(
    settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "has_avx512", lambda: False)
    altered(monkeypatch, *["from stepladder import models; models.has_avx512 = lambda: False"] * 2)
    with fleet(settings, tmp_path):  # weights that are not quantised
        pass
    (weights(tmp_path) / "config.json").write_text('{"quantization_config": {}}')
    with (
        pytest.raises(ServeError, match="on cards and on CPUs with AVX-512"),
        fleet(settings, tmp_path),
    ):
        pass
    vllm_answers = f'predict = {{ engine = "vllm" }}\nserve = {{ environment = "{settings.environment}" }}'
    context = Context.open(run_file(tmp_path, vllm_answers), tmp_path / "runs")
    flow.check_group_size(context)
    with pytest.raises(ServeError, match="AVX-512"):  # before a run begins
        flow.check_kernels(context)
    monkeypatch.setattr(models, "has_avx512", lambda: True)
    flow.check_kernels(context)


KILLED = """
import signal, sys, time
from pathlib import Path
from stepladder.config import Serve
from stepladder.serving.probe import free_port, is_healthy, is_ours
from stepladder.serving.fleet import Fleet
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts in the background
settings = Serve(environment=Path(sys.argv[1]), startup=20, kv_cache_gib=0.01)
with Fleet(Path(sys.argv[2]), "student", settings, Path(sys.argv[3])):
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_nothing_behind(settings: Serve, tmp_path: Path, sent: int) -> None:
    words = [sys.executable, "-c", KILLED, settings.environment, weights(tmp_path), tmp_path / "serve"]
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        started = pids(settings)
        assert all(map(is_alive, started))
        run.send_signal(sent)
    until(lambda: not any(map(is_alive, started)))


def test_cards_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-7,3")
    assert cards_by_server(Serve()) == [("0",), ("1",), ("GPU-7",), ("3",)]
    assert cards_by_server(Serve(tensor_parallel=2)) == [("0", "1"), ("GPU-7", "3")]
    assert cards_by_server(Serve(tensor_parallel=3)) == [("0", "1", "GPU-7")]
    with pytest.raises(ServeError, match="there are 4 cards"):
        cards_by_server(Serve(tensor_parallel=5))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cards_by_server(Serve()) == [()]
    with pytest.raises(ServeError, match="no card"):
        cards_by_server(Serve(tensor_parallel=2))


def test_the_command_line(tmp_path: Path) -> None:
    own = Serve(environment=tmp_path, kv_cache_gib=8)
    words = server_command(tmp_path, "s", own, 2, "10.0.0.7", 80, tmp_path / "stops")
    assert words[:3] == [str(tmp_path / "bin" / "vllm"), "serve", str(tmp_path)]
    flags = dict(itertools.pairwise(words))
    assert (flags["--host"], flags["--port"]) == ("10.0.0.7", "80")
    assert flags["--tensor-parallel-size"] == "2"
    assert flags["--kv-cache-memory-bytes"] == str(8 * 2**30)
    assert flags["--max-model-len"] == "4096"
    assert flags["--max-num-seqs"] == "256"
    assert "--block-size" not in flags
    assert "--enable-prefix-caching" in words
    environment = server_environment(2, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert (environment["DO_NOT_TRACK"], environment["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert "TORCHDYNAMO_DISABLE" not in environment
    words = server_command(tmp_path, "s", Serve(prefix_caching=False), 0, THIS_MACHINE, 80, tmp_path / "stops")
    assert server_environment(0, {})["TORCHDYNAMO_DISABLE"] == "1"
    assert dict(itertools.pairwise(words))["--kv-cache-memory-bytes"] == str(2 * 2**30)
    assert "--no-enable-prefix-caching" in words
    assert "--tensor-parallel-size" not in words
    assert int(dict(itertools.pairwise(words))["--block-size"]) < 128  # vLLM's own, in which few prompts share anything


def test_nothing_but_where_answers_end_is_taken_from_the_weights(settings: Serve, tmp_path: Path) -> None:
    with fleet(settings, tmp_path):
        pass
    assert (settings.environment / "bin" / "generation").read_text() == '{"eos_token_id": [2, 3]}'


def test_a_package_serves_this_machine_only_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    templates = Environment(loader=PackageLoader("stepladder.packaging", "files"), autoescape=False)  # noqa: S701
    package = SimpleNamespace(name="demo", leader="a", longest=100, engine="vllm")
    (tmp_path / "serve.sh").write_text(templates.get_template("serve.sh.j2").render(package=package))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text('#!/bin/sh\necho "$*"\necho "$VLLM_API_KEY"\n')
    (tmp_path / "bin" / "vllm").chmod(0o755)
    shellcheck = Path(sys.prefix) / "bin" / "shellcheck"
    assert subprocess.run([shellcheck, tmp_path / "serve.sh"], check=False).returncode == 0

    def serve(**variables: str) -> tuple[list[str], str]:
        environment = {"PATH": os.environ["PATH"], "VLLM": str(tmp_path), **variables}
        done = subprocess.run(
            ["/bin/sh", tmp_path / "serve.sh"], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines(), done.stderr

    (words, key), said = serve()
    assert "--host 127.0.0.1 --port 8000" in words
    assert len(key) == 48
    assert key not in words
    assert said == f"VLLM_API_KEY={key}\n"
    assert serve()[0][1] != key
    assert serve(ADDRESS="0.0.0.0") == (  # noqa: S104
        [],
        "error: others can reach 0.0.0.0, so set VLLM_API_KEY to the key that they must send\n",
    )
    (words, key), said = serve(ADDRESS="0.0.0.0", VLLM_API_KEY="ours")  # noqa: S104
    assert ("--host 0.0.0.0" in words, key, said) == (True, "ours", "")
    compose = templates.get_template("compose.yaml.j2").render(package=package)
    assert 'ports: ["127.0.0.1:8000:8000"]' in compose
    assert "ADDRESS: 0.0.0.0" in compose
