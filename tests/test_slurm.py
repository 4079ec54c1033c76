"""Servers and pieces of files as steps of a Slurm job: a real slurmctld and a real slurmd on this machine, one node
with two cards that are only numbers. The stand-in of tests/test_serving.py is what serves."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_shards
from made import made_by, tiny_model
from test_cluster import RUN
from test_questions import Stage, stage
from test_serving import is_alive, pids, settings, until, weights

from stepladder.config import Serve
from stepladder.serving.probe import free_port

__all__ = ["settings", "stage"]  # fixtures
pytestmark = pytest.mark.cluster
GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "slurm.md"
CONTROLLER, DAEMON = "/usr/sbin/slurmctld", "/usr/sbin/slurmd"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=3
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
JOB = """#!/bin/sh
#SBATCH --nodes=1 --gres=gpu:2 --exclusive
exec "$PYTHON" -c "$DRIVER" "$@"
"""
SERVING = """
import sys, time
from pathlib import Path
from stepladder.config import Serve
from stepladder.nodes.on_slurm import OnSlurm
from stepladder.serving.fleet import Fleet
settings = Serve(environment=Path(sys.argv[1]), startup=60, kv_cache_gib=0.01)
with Fleet(Path(sys.argv[2]), "student", settings, Path(sys.argv[3]), note=print, nodes=OnSlurm()) as fleet:
    while not Path(sys.argv[3], "enough").exists():
        time.sleep(0.1)
"""
IN_PIECES = """
from stepladder import cli
from stepladder.stages import questions
questions.PIECE_BYTES = 5000
cli.main()
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of Slurm's commands, with its daemons running."""
    if not (Path(CONTROLLER).exists() and os.geteuid() == 0):
        pytest.skip("needs Slurm (Debian: slurm-wlm) and root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {name: free_port("127.0.0.1") for name in ("control_port", "node_port")}
    words = CONFIGURATION.format(host=socket.gethostname(), folder=folder, cores=os.cpu_count(), **ports)
    (folder / "slurm.conf").write_text(words)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
    daemons = [subprocess.Popen([program, "-D"], env=environment) for program in (CONTROLLER, DAEMON)]
    try:
        until(lambda: b"idle" in subprocess.check_output(["/usr/bin/sinfo", "-h"], env=environment))
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


def submit(slurm: dict[str, str], folder: Path, driver: str, *arguments: str) -> str:
    """Submit a job that runs Python code on its node; returns its number."""
    (folder / "job.sh").write_text(JOB)
    words = ["/usr/bin/sbatch", "--parsable", f"--output={folder / 'out'}", str(folder / "job.sh"), *arguments]
    submitted = subprocess.run(words, env=slurm | {"DRIVER": driver}, check=True, capture_output=True, text=True)
    return submitted.stdout.strip()


def test_servers_are_steps_of_the_job_and_end_with_it(slurm: dict[str, str], settings: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "serve"
    number = submit(slurm, tmp_path, SERVING, str(settings.environment), str(weights(tmp_path)), str(folder))

    def addresses() -> list[str]:
        listed = folder / "addresses.txt"
        return listed.read_text().split() if listed.exists() else []

    until(lambda: len(addresses()) == 2)
    assert sum(map(is_alive, pids(settings))) == 4  # two servers and their engines
    before = addresses()
    os.kill(pids(settings)[0], signal.SIGKILL)
    until(lambda: len(addresses()) == 2 and addresses() != before)
    subprocess.run(["/usr/bin/scancel", number], env=slurm, check=True)
    until(lambda: not any(map(is_alive, pids(settings))))


def test_pieces_of_files_are_steps_of_the_job(slurm: dict[str, str], stage: Stage, tmp_path: Path) -> None:
    stage.write(**test_shards.files(random.Random(5)))
    assert stage.run() == 0
    whole = test_shards.made(stage)
    (stage.made / "manifest.json").unlink()
    with Path("run.toml").open("a") as file:
        file.write('[cluster]\nscheduler = "slurm"\n')
    submit(slurm, tmp_path, IN_PIECES, "questions", "run.toml")
    until((stage.made / "manifest.json").exists, 60)
    assert test_shards.made(stage) == whole


def test_the_guide_s_batch_file_runs_a_whole_run(
    slurm: dict[str, str], settings: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the number of nodes and cards. What it makes is what the same run makes without Slurm."""
    (settings.environment / "bin" / "varied").touch()
    tiny_model(tmp_path / "student")
    for name, rows in test_shards.files(random.Random(6)).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RUN.replace("ENVIRONMENT", str(settings.environment))
    (tmp_path / "alone.toml").write_text(run)
    (tmp_path / "my.toml").write_text(f'{run}[cluster]\nscheduler = "slurm"\n')
    command = tmp_path / ".venv" / "bin" / "stepladder"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stepladder "$@"\n')
    command.chmod(0o755)
    batch_file = re.search(r"#!/bin/sh\n(?:.*\n)*?(?=```)", GUIDE.read_text(encoding="utf-8"))
    assert batch_file is not None
    assert batch_file[0].endswith("stepladder run my.toml\n")
    (tmp_path / "job.sh").write_text(batch_file[0].replace("=4\n", "=1\n").replace("gpu:4", "gpu:2"))
    monkeypatch.chdir(tmp_path)
    subprocess.run(["/usr/bin/sbatch", "--wait", "--output=out", "job.sh"], env=slurm, check=True, timeout=300)
    cards = json.loads((settings.environment / "bin" / "environment").read_text())["CUDA_VISIBLE_DEVICES"]
    assert cards in ("0", "1")
    words = [sys.executable, "-m", "stepladder", "run", "alone.toml", "--runs", "alone"]
    subprocess.run(words, check=True, timeout=300)
    assert made_by(tmp_path / "runs" / "run") == made_by(tmp_path / "alone" / "run")
