"""Servers, trainings and pieces of files on the nodes of a Ray cluster: several raylets on this machine, whose cards
are numbers only. The stand-in of tests/test_serving.py is what serves."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_distributed
import test_shards
import test_swift
from made import made_by
from test_questions import Stage, stage
from test_serving import asked_of, is_alive, members, pids, script, settings, until, weights

from stepladder import cli
from stepladder.config import Cluster, Serve, Train
from stepladder.errors import ServeError
from stepladder.nodes import NODE_ADDRESS, Ended, Slot
from stepladder.nodes.gang import Gang
from stepladder.nodes.on_ray import OnRay
from stepladder.serving.fleet import Fleet
from stepladder.stages import questions
from stepladder.training import distributed, swift
from stepladder.training.data import Data

__all__ = ["settings", "stage"]  # fixtures
pytestmark = pytest.mark.cluster
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
QUICK = {
    "health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}  # fmt: skip
"""A silent node counts as lost after seconds instead of a minute."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cards, which this process is a driver of."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "_system_config": QUICK})
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    ray.shutdown()
    made.shutdown()
    del os.environ["RAY_ADDRESS"]


@pytest.fixture
def nodes(cluster: Any) -> Iterator[Any]:
    """Two nodes with two cards each, by their names."""
    added = {name: cluster.add_node(**NODE, num_gpus=2, resources={name: 1}) for name in ("first", "second")}
    cluster.wait_for_nodes()
    yield added
    for node in [*cluster.worker_nodes]:
        cluster.remove_node(node, allow_graceful=False)


def fleet(settings: Serve, tmp_path: Path, notes: list[str] | None = None) -> Fleet:
    said = [] if notes is None else notes
    return Fleet(weights(tmp_path), "student", settings, tmp_path / "serve", said.append, nodes=OnRay("auto"))


def addresses(running: Fleet) -> set[str]:
    return set(running.addresses.read_text().split())


def servers(settings: Serve) -> list[int]:
    """The servers that run, without their engines."""
    first = [int(path.read_text().split()[0]) for path in settings.environment.glob("bin/pids-*")]
    return [pid for pid in first if is_alive(pid)]


def test_a_command_runs_on_a_node_and_says_how_it_ended(cluster: Any, nodes: Any, tmp_path: Path) -> None:
    os.environ["OPENAI_API_KEY"] = "paid for"
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['{}'], os.environ['OWN']); os._exit(7)"
    log = tmp_path / "log"
    on_ray = OnRay("auto")
    assert on_ray.slots(1) == [Slot(1)] * 4
    assert on_ray.slots(2) == [Slot(2)] * 2
    words = [sys.executable, "-uc", code.format(NODE_ADDRESS)]
    with on_ray.running(Slot(2), words, {"OWN": "x"}, log) as running:
        until(running.poll)
        assert running.poll() == Ended(7)
    said = log.read_text()
    assert said.startswith("0,1 ")
    assert said.endswith(" x\n")


def test_servers_stand_on_every_card_of_every_node(nodes: Any, settings: Serve, tmp_path: Path) -> None:
    with fleet(settings, tmp_path) as running:
        until(lambda: len(addresses(running)) == 4)
        assert len(pids(settings)) == 8
        cards = [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in servers(settings)]
        assert sorted(cards) == ["0", "0", "1", "1"]
    assert not any(map(is_alive, pids(settings)))


def test_what_is_lost_is_started_again_elsewhere_or_when_a_node_joins(
    cluster: Any, nodes: Any, settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server, the actor that holds one, a node whose server ignores SIGTERM, and all nodes until another joins."""
    (settings.environment / "bin" / "stubborn").touch()
    notes: list[str] = []
    with fleet(settings, tmp_path, notes) as running:
        until(lambda: len(addresses(running)) == 4)
        before = addresses(running)
        os.kill(servers(settings)[0], signal.SIGKILL)
        until(lambda: len(addresses(running) - before) == 1 and len(addresses(running)) == 4)
        victim = servers(settings)[0]
        held = {victim, *(child.pid for child in psutil.Process(victim).children())}
        before = addresses(running)
        keeper = next(parent for parent in psutil.Process(victim).parents() if parent.name().startswith("ray::"))
        keeper.kill()
        until(lambda: not any(map(is_alive, held)))
        until(lambda: len(addresses(running) - before) == 1 and len(addresses(running)) == 4)
        cluster.remove_node(nodes["first"], allow_graceful=False)
        until(lambda: len(addresses(running)) == len(servers(settings)) == 2)
        cluster.remove_node(nodes["second"], allow_graceful=False)
        until(lambda: not addresses(running) and not servers(settings))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # of this machine, which the node would take for its own
        cluster.add_node(**NODE, num_gpus=3)
        until(lambda: len(addresses(running)) == 3)
        assert running.failure is None
        assert any("ended" in note for note in notes)
        assert any("was lost" in note for note in notes)
        assert [process.pid for process in psutil.process_iter() if process.pid in held] == []
    assert not any(map(is_alive, pids(settings)))


DRIVER = """
import sys, time
from pathlib import Path
from stepladder.config import Serve
from stepladder.nodes.on_ray import OnRay
from stepladder.serving.fleet import Fleet
settings = Serve(environment=Path(sys.argv[1]), startup=20, kv_cache_gib=0.01)
with Fleet(Path(sys.argv[2]), "student", settings, Path(sys.argv[3]), nodes=OnRay("auto")):
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_driver_leaves_nothing_on_the_nodes(
    nodes: Any, settings: Serve, tmp_path: Path, sent: signal.Signals
) -> None:
    words = [sys.executable, "-c", DRIVER, settings.environment, weights(tmp_path), tmp_path / "serve"]
    with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        assert servers(settings)
        run.send_signal(sent)
    until(lambda: not any(map(is_alive, pids(settings))))


def test_a_server_that_does_not_start_anywhere_says_why(nodes: Any, settings: Serve, tmp_path: Path) -> None:
    script(settings.environment / "bin", "ValueError: no such architecture")
    with pytest.raises(ServeError, match="did not start: ValueError: no such architecture"), fleet(settings, tmp_path):
        pass


def test_a_package_answers_through_servers_on_the_nodes(
    nodes: Any, settings: Serve, base: Path, tmp_path: Path
) -> None:
    members(base, tmp_path, a="Answer: B", b="Answer: B", c="Answer: A")
    letters, _ = asked_of(settings, tmp_path, cluster=Cluster(scheduler="ray"))
    assert letters == {"B"}
    assert len(pids(settings)) >= 2 * 3
    assert not any(map(is_alive, pids(settings)))


@pytest.fixture
def two_nodes(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes without cards."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for _ in range(2):
        cluster.add_node(**NODE)
    yield
    for node in [*cluster.worker_nodes]:
        cluster.remove_node(node, allow_graceful=False)


class KillOnce:
    """Kills one of the two processes of a training, once it is at some step. Called as a report."""

    def __init__(self, word: str, step: int) -> None:
        self._word, self._step = word, step
        self.killed: list[int] = []

    def __call__(self, step: int, *_: object) -> None:
        if step >= self._step and not self.killed:
            found = [process for process in psutil.process_iter(["cmdline", "environ"]) if self._is_ours(process.info)]
            pids = {process.pid for process in found}
            ranks = [process for process in found if process.ppid() not in pids]  # the others load their data
            assert len(ranks) == 2
            ranks[0].kill()
            self.killed.append(step)

    def _is_ours(self, info: dict[str, Any]) -> bool:
        return self._word in (info["cmdline"] or ()) and "LOCAL_RANK" in (info["environ"] or ())


def test_a_training_over_two_nodes_survives_a_killed_process(two_nodes: None, base: Path, tmp_path: Path) -> None:
    """It learns what two processes of one machine learn, whether it is disturbed or not."""
    settings = Train.model_validate(test_distributed.ONE.model_dump() | {"devices": 2, "save_steps": 2})
    notes: list[str] = []
    gang = Gang(OnRay("auto"), 2, notes.append)
    kill_one = KillOnce(str(tmp_path / "gang" / "scratch" / "job.json"), 3)
    train_twice(distributed.train, settings, base, test_distributed.DATA, tmp_path, kill_one, gang)
    (note,) = notes
    assert "goes on from the last checkpoint" in note


def train_twice(
    train: Callable[..., None], settings: Train, base: Path, data: Data, tmp_path: Path, kill_one: KillOnce, gang: Gang
) -> None:
    """Train on this machine, and over nodes while a process is killed: both learn the same."""
    for name, report, over in (("alone", lambda *_: None, None), ("gang", kill_one, gang)):
        folder = tmp_path / name
        for part in ("adapter", "scratch"):
            (folder / part).mkdir(parents=True)
        train(settings, 5, base, data, folder / "adapter", folder / "scratch", report, over)
    assert kill_one.killed
    assert_alike(tmp_path / "alone", tmp_path / "gang")


def assert_alike(alone: Path, gang: Path) -> None:
    """Two trainings have the same losses and weights, but for the order in which gradients are summed."""
    from safetensors.torch import load_file

    curves = [test_distributed.curve(folder) for folder in (alone, gang)]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for row, other in zip(*curves, strict=True):
        assert row.get("loss") == pytest.approx(other.get("loss"), abs=0.05)
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, gang))
    for name, tensor in one.items():
        assert (tensor - two[name]).norm() < 0.03 * tensor.norm(), name


def test_ms_swift_over_two_nodes_survives_a_killed_process(two_nodes: None, base: Path, tmp_path: Path) -> None:
    if not test_swift.ENVIRONMENT.is_dir():
        pytest.skip("needs ms-swift (make swift)")
    settings = test_swift.SETTINGS.model_copy(update={"devices": 2})
    data, notes = Data([test_swift.example(number) for number in range(20)], []), list[str]()
    gang = Gang(OnRay("auto"), 2, notes.append)
    kill_one = KillOnce(str(tmp_path / "gang" / "scratch" / "swift"), 5)
    train_twice(swift.train, settings, base, data, tmp_path, kill_one, gang)
    (note,) = notes
    assert "goes on from the last checkpoint" in note


def test_no_cluster_is_one_line() -> None:
    code = "from stepladder.nodes.on_ray import OnRay; OnRay('127.0.0.1:9')"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ClusterError: [cluster] address = '127.0.0.1:9': no Ray cluster answers" in done.stderr.splitlines()[-1]


def test_pieces_of_files_on_nodes_give_the_bytes_of_one_process(
    cluster: Any, nodes: Any, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a node is lost."""
    stage.write(**test_shards.files(random.Random(4)))
    assert stage.run() == 0
    whole = test_shards.made(stage)
    (stage.made / "manifest.json").unlink()
    monkeypatch.setattr(questions, "PIECE_BYTES", 5000)
    with Path("run.toml").open("a") as file:
        file.write('[cluster]\nscheduler = "ray"\n')
    started: list[str] = []

    def lose_a_node(self: OnRay, slot: Slot, command: Sequence[str], *rest: Any) -> Any:
        started.append(command[3])
        if len(started) == 6:
            cluster.remove_node(nodes["first"], allow_graceful=False)
        return running(self, slot, command, *rest)

    running = OnRay.running
    monkeypatch.setattr(OnRay, "running", lose_a_node)
    assert stage.run() == 0
    assert {*started} == {"shared", "pairs", "splits"}
    assert test_shards.made(stage) == whole


RUN = """
name = "run"
language = "en"
questions = { train = "train.jsonl", test = "test.jsonl" }
rung = [{ name = "easy", models = ["own"], orders = 2 }, { name = "worked", kind = "worked" }]
member = [{ name = "a", clean = false }]
predict = { engine = "vllm", max_tokens = 8 }
quantise = { method = "rtn", group_size = 32, max_loss = 1.0, max_unparsed = 1.0, max_kl = 100.0 }
[train]
base = "student"
lora_rank = 4
lora_alpha = 8
epochs = 1
[models.own]
engine = "vllm"
path = "student"
[serve]
environment = "ENVIRONMENT"
kv_cache_gib = 0.01
startup = 60
"""


def test_the_same_run_makes_the_same_files_on_no_on_one_and_on_three_nodes(
    cluster: Any, settings: Serve, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of files, servers for a rung and for members; the stand-in answers by what it is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(questions, "PIECE_BYTES", 12_000)
    (settings.environment / "bin" / "varied").touch()
    shutil.copytree(base, tmp_path / "student")
    rows = test_shards.files(random.Random(6))
    for name in ("train", "test"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    made: list[dict[str, bytes]] = []
    for count in (0, 1, 3):
        cluster_table = f'[cluster]\nscheduler = "ray"\nledger = "own-{count}.sqlite"\n' if count else ""
        Path("run.toml").write_text(RUN.replace("ENVIRONMENT", str(settings.environment)) + cluster_table)
        added = [cluster.add_node(**NODE, num_gpus=0) for _ in range(count)]
        cluster.wait_for_nodes()
        monkeypatch.setattr(sys, "argv", ["stepladder", "run", "run.toml", "--runs", f"runs-{count}"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        made.append(made_by(Path(f"runs-{count}", "run")))
        assert Path(f"runs-{count}", "ledger.sqlite").exists() == (not count)
        for node in added:
            cluster.remove_node(node, allow_graceful=False)
    assert made[0] == made[1] == made[2]
    assert {
        letter
        for line in made[0]["predictions/a/quantised.test.jsonl"].splitlines()
        for letter in json.loads(line)["votes"]
    } > {"A"}
    assert b"near-duplicate" in made[0]["questions/audit.json"]
