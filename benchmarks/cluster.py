"""A run on two Ray nodes of this machine, with two cards each that are numbers only, while parts of it are lost.

    python benchmarks/cluster.py kills [--times 10] [--seed 0] [--what server actor node driver nodes]
    python benchmarks/cluster.py straggler [--times 3]
    python benchmarks/cluster.py gang [--times 5]
    python benchmarks/cluster.py servers --weights runs/demo/merged/full --questions runs/demo/questions/test.jsonl

The run goes from question files, in pieces, to predictions. A small program stands for vLLM (tests/test_serving.py); it
ignores SIGTERM, and it takes half a second an answer.

"kills": at a random moment a server, the actor that holds one, a node, the driver, or both nodes are killed; five
seconds after both nodes another one joins, and a killed driver is started again. Prints, for each, when that was,
whether the run's files are those of an undisturbed run, whether the ledger holds the same keys, each once, and how long
processes of the run were left when it was over.

"straggler": a server is stopped (SIGSTOP) once it has been asked, and goes on when all answers but a few are there, so
that its own come late. Prints how many times as long as undisturbed the answers take, start included, and whether the
ledger holds each once.

"gang": the bundled model is trained by a process on each node, one of which is killed at a random step. Prints how far
losses and weights are from those of an undisturbed training.

"servers": a real vLLM (make serve-env) on each of two nodes of one core, without cards, answers the questions, and one
that has both cores. Prints how many answers are the same word for word.

Needs Ray: pip install 'stepladder[cluster,train]'.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from made import made_by, tiny_model
from safetensors.torch import load_file
from test_cluster import NODE, QUICK, RUN, KillOnce
from test_distributed import DATA, ONE, curve
from test_serving import is_alive, stand_in
from test_shards import files

from stepladder import models, records
from stepladder.answering.client import FolderClient
from stepladder.ask.request import Request
from stepladder.config import Cluster, Serve, Train
from stepladder.mcq.prompts import ask_messages
from stepladder.nodes.gang import Gang
from stepladder.nodes.on_ray import OnRay
from stepladder.progress import Progress
from stepladder.records import Question
from stepladder.training import distributed

MILLISECONDS = 500
"""That a server takes for an answer."""
DRIVER = """
import sys
from stepladder import cli
from stepladder.stages import questions, trainset
questions.PIECE_BYTES = trainset.PIECE_BYTES = 12_000
cli.main()
"""
LOSSES = ("loss", "validation_loss")
NEVER = 10**6
"""A step."""
ASKED, LATE = 20, 4
"""Answers after which a server is stopped, and those that are missing when it goes on."""
JOIN_SECONDS = 5
LEFT_SECONDS = 15
"""That processes may take to end when the run is over."""
ANSWER_TOKENS = 128


class World:
    """Two nodes, a run's files, and the stand-in for vLLM, in a folder."""

    def __init__(self, folder: Path, cluster: Any, dice: random.Random) -> None:
        self.folder, self.cluster, self.dice = folder, cluster, dice
        self.binaries = stand_in(folder / "env")
        for name, content in (("varied", ""), ("stubborn", ""), ("milliseconds", str(MILLISECONDS))):
            (self.binaries / name).write_text(content)
        (folder / "student").mkdir()
        tiny_model(folder / "student")
        for name, rows in files(random.Random(6)).items():
            if name != "reviewed":
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = RUN.replace("ENVIRONMENT", str(self.binaries.parent))
        (folder / "run.toml").write_text(f'{text}[cluster]\nscheduler = "ray"\n')

    def fill(self) -> None:
        """Have two nodes."""
        while len(self.cluster.worker_nodes) < 2:
            self.add()

    def add(self) -> None:
        self.cluster.add_node(**NODE, num_gpus=2)
        self.cluster.wait_for_nodes()

    def start(self, runs: str, *words: str) -> subprocess.Popen[bytes]:
        """Start the driver."""
        log = (self.folder / f"{runs}.log").open("ab")
        command = [sys.executable, "-c", DRIVER, *(words or ("run",)), "run.toml", "--runs", runs]
        with log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)

    def servers(self) -> list[psutil.Process]:
        """The servers that run, without their engines."""
        pids = [int(path.read_text().split()[0]) for path in self.binaries.glob("pids-*") if path.read_text()]
        return [psutil.Process(pid) for pid in pids if is_alive(pid)]

    def left(self) -> list[psutil.Process]:
        """The run's processes, wherever they are."""
        engines = {int(path.read_text().split()[1]) for path in self.binaries.glob("pids-*") if path.read_text()}

        def is_ours(process: psutil.Process) -> bool:
            words = process.info["cmdline"] or ()
            return is_alive(process.pid) and (process.pid in engines or any(str(self.folder) in word for word in words))

        return [process for process in psutil.process_iter(["cmdline"]) if is_ours(process)]

    def made(self, runs: str) -> dict[str, bytes]:
        """What a run has made."""
        return made_by(self.folder / runs / "run")

    def keys(self, runs: str) -> list[str]:
        """The keys of the answers in a run's ledger."""
        with contextlib.closing(sqlite3.connect(self.folder / runs / "ledger.sqlite")) as ledger:
            return sorted(
                key for (key,) in ledger.execute("SELECT key FROM responses JOIN requests ON requests.id = request")
            )


def kill_server(world: World) -> bool:
    return killed(world.servers(), world)


def kill_actor(world: World) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        parents = (parent for server in world.servers() for parent in server.parents())
        return killed([parent for parent in parents if parent.name().startswith("ray::")], world)
    return False


def killed(processes: list[psutil.Process], world: World) -> bool:
    """Kill one of them; returns whether there was one."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        world.dice.choice(processes).kill()
        return True
    return False


def kill_node(world: World) -> bool:
    world.cluster.remove_node(world.dice.choice([*world.cluster.worker_nodes]), allow_graceful=False)
    return True


def kill_nodes(world: World) -> bool:
    for node in [*world.cluster.worker_nodes]:
        world.cluster.remove_node(node, allow_graceful=False)
    time.sleep(JOIN_SECONDS)
    world.add()
    return True


KILLS: dict[str, Callable[[World], bool] | None] = {
    "server": kill_server, "actor": kill_actor, "node": kill_node, "driver": None, "nodes": kill_nodes,
}  # fmt: skip


class Disturbed(NamedTuple):
    """How a disturbed run ended."""

    moment: float
    """Of the kill, seconds after the start."""
    code: int
    left: float
    """Seconds that processes were left after the end; of a killed driver, after its death."""


def disturbed(world: World, runs: str, what: str, moment: float) -> Disturbed | None:
    """A run in which something is killed, as soon after the moment as there is one; None if it was over before."""
    begun = time.monotonic()
    run = world.start(runs)
    kill = KILLS[what]
    while (now := time.monotonic() - begun) < moment or (kill is not None and not kill(world)):
        if run.poll() is not None:
            return None
        time.sleep(0.02)
    if kill is None:
        run.kill()
        run.wait()
        gone = until_gone(world)
        run = world.start(runs)
    code = run.wait()
    return Disturbed(now, code, max(until_gone(world), gone if kill is None else 0))


def until_gone(world: World) -> float:
    """Seconds until no process of the run is left."""
    begun = time.monotonic()
    while left := world.left():
        if time.monotonic() > begun + 2 * LEFT_SECONDS:
            sys.exit(f"left: {[process.info['cmdline'] for process in left]}")
        time.sleep(0.05)
    return time.monotonic() - begun


def kills(world: World, times: int, names: list[str]) -> None:
    world.fill()
    begun = time.monotonic()
    if world.start("undisturbed").wait():
        sys.exit((world.folder / "undisturbed.log").read_text())
    seconds = time.monotonic() - begun
    expected, keys = world.made("undisturbed"), world.keys("undisturbed")
    print(f"undisturbed: {seconds:.1f} s, {len(keys)} answers", flush=True)
    for what in names:
        good = number = 0
        longest = 0.0
        while number < times:
            world.fill()
            runs = f"{what}-{number}"
            ended = disturbed(world, runs, what, world.dice.uniform(0, seconds))
            if ended is None:
                shutil.rmtree(world.folder / runs)
                continue
            number += 1
            files_are = "the same" if world.made(runs) == expected else "OTHERS"
            keys_are = "the same" if world.keys(runs) == keys else "OTHERS"
            good += ended.code == 0 and files_are == keys_are == "the same" and ended.left < LEFT_SECONDS
            longest = max(longest, ended.left)
            print(
                f"  {what} killed after {ended.moment:.1f} s: exit code {ended.code}, files {files_are}, keys "
                f"{keys_are}, processes left for {ended.left:.1f} s",
                flush=True,
            )
        print(f"{what}: {good} of {times} good, processes left for at most {longest:.1f} s", flush=True)


def straggler(world: World, times: int) -> None:
    world.fill()
    for number in range(times):
        seconds: dict[str, float] = {}
        keys: dict[str, list[str]] = {}
        stopped = list[psutil.Process]()
        at = 0
        for name in ("undisturbed", "straggler"):
            runs = f"{name}-{number}"
            world.start(runs, "questions").wait()
            run, begun = world.start(runs, "samples"), time.monotonic()
            while run.poll() is None and name == "straggler":
                answers = count(world, runs)
                if not stopped and answers > ASKED:
                    at = answers
                    stopped.append(world.dice.choice(world.servers()))
                    stopped[0].send_signal(signal.SIGSTOP)
                elif answers >= len(keys["undisturbed"]) - LATE:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        stopped[0].send_signal(signal.SIGCONT)
                time.sleep(0.02)
            run.wait()
            seconds[name] = time.monotonic() - begun
            keys[name] = world.keys(runs)
        if not stopped:
            sys.exit("the answers were all there before a server was stopped")
        same = "the same" if keys["undisturbed"] == keys["straggler"] else "OTHERS"
        without, slowed = seconds["undisturbed"], seconds["straggler"]
        print(
            f"{without:.1f} s; with a server stopped after {at} of {len(keys['straggler'])} answers {slowed:.1f} s "
            f"({slowed / without:.2f} times), keys {same}",
            flush=True,
        )


def gang(world: World, times: int) -> None:
    world.fill()
    undisturbed = world.folder / "gang"
    train_on_nodes(undisturbed, NEVER)
    expected = curve(undisturbed)
    print(f"undisturbed: {expected[-1]['step']} steps", flush=True)
    for number in range(times):
        folder = world.folder / f"gang-{number}"
        killed = train_on_nodes(folder, world.dice.choice(range(1, int(expected[-1]["step"]))))
        rows = curve(folder)
        if not killed or [row["step"] for row in rows] != [row["step"] for row in expected]:
            sys.exit(f"{folder}: not killed, or other steps")
        pairs = [(row.get(name), other.get(name)) for row, other in zip(rows, expected, strict=True) for name in LOSSES]
        worst = max(abs(own - other) for own, other in pairs if own is not None and other is not None)
        whole, own = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (undisturbed, folder))
        share = max(float((tensor - own[name]).norm() / tensor.norm()) for name, tensor in whole.items())
        print(
            f"  a process killed at step {killed[0]}: losses {worst:.2g} nats apart at most, weights {share:.2g} of "
            "their norm",
            flush=True,
        )


def train_on_nodes(folder: Path, kill_at: int) -> list[int]:
    """Train, and kill one of the two processes at a step; returns at which it was."""
    for part in ("adapter", "scratch"):
        (folder / part).mkdir(parents=True)
    settings = Train.model_validate(ONE.model_dump() | {"learning_rate": 2e-4, "devices": 2, "save_steps": 2})
    kill_one = KillOnce(str(folder / "scratch" / "job.json"), kill_at)
    base, nodes = models.locate(models.BUNDLED), Gang(OnRay("auto"), 2, lambda note: None)
    distributed.train(settings, 5, base, DATA, folder / "adapter", folder / "scratch", kill_one, nodes)
    return kill_one.killed


def servers(world: World, settings: Serve, weights: Path, questions: Path) -> None:
    requests = [
        Request(
            model="student", messages=ask_messages(question, tuple(range(len(question.options)))),
            max_tokens=ANSWER_TOKENS, final=True,
        )
        for question in records.stream(questions, Question)
    ]  # fmt: skip
    answers = {}
    for name, cluster in (("one server", None), ("two nodes", Cluster(scheduler="ray"))):
        progress, scratch = Progress(Console()), world.folder / f"{name} servers"
        begun = time.monotonic()
        with FolderClient(
            world.folder / f"{name}.sqlite", name, scratch, settings, "float32", progress, cluster=cluster
        ) as client:
            found = client.ask(weights, requests, name, "vllm")
            answers[name] = [found[request.key].text for request in requests]
        logs = len([*scratch.rglob("*.log")])
        print(f"{name}: {len(requests)} answers, {time.monotonic() - begun:.0f} s with the start, {logs} servers' logs")
    same = sum(one == other for one, other in zip(*answers.values(), strict=True))
    print(f"{same} of {len(requests)} answers the same word for word")


def count(world: World, runs: str) -> int:
    """The answers in a run's ledger so far."""
    try:
        return len(world.keys(runs))
    except sqlite3.Error:
        return 0


@contextlib.contextmanager
def cluster_of_this_machine() -> Iterator[Any]:
    """A head without cores."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "_system_config": QUICK})
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield made
    finally:
        ray.shutdown()  # where this process has joined it
        made.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["kills", "straggler", "gang", "servers"])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", nargs="+", choices=[*KILLS], default=[*KILLS])
    parser.add_argument("--weights", type=Path, help="servers: a model folder")
    parser.add_argument("--questions", type=Path, help="servers: a file of a run's questions")
    parser.add_argument("--environment", type=Path, default=Path(".venv-serve"), help="servers: where vLLM is")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster_of_this_machine() as cluster:
        world = World(Path(folder), cluster, random.Random(given.seed))
        if given.kind == "kills":
            kills(world, given.times, given.what)
        elif given.kind == "straggler":
            straggler(world, given.times)
        elif given.kind == "gang":
            gang(world, given.times)
        else:
            for _ in range(2):
                cluster.add_node(**NODE | {"num_cpus": 1})
            cluster.wait_for_nodes()
            settings = Serve(environment=given.environment.resolve(), dtype="float32", kv_cache_gib=1)
            servers(world, settings, given.weights.resolve(), given.questions.resolve())


if __name__ == "__main__":
    main()
