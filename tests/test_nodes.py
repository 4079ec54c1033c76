"""What a cluster needs and refuses, without one (tests/test_cluster.py has one), and that commands end with their
supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from made import run_file
from test_serving import is_alive, until

from stepladder.config import Cluster, load
from stepladder.context import Context
from stepladder.errors import ClusterError, ConfigError
from stepladder.nodes import THIS_MACHINE, Ended, Slot, gang
from stepladder.nodes.chosen import nodes_of
from stepladder.nodes.here import Here
from stepladder.supervise import child_environment, supervised


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"Ray is not installed: pip install 'stepladder\[cluster\]'$"):
        nodes_of(Cluster(scheduler="ray"))


def test_the_command_line_does_not_import_ray() -> None:
    code = "import stepladder.cli, stepladder.nodes.chosen, stepladder.stages.flow, sys; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_slurm_is_used_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ClusterError, match=r"not inside a Slurm job; start it in one, with sbatch or salloc"):
        nodes_of(Cluster(scheduler="slurm"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('cluster = { scheduler = "kubernetes" }', "'ray' or 'slurm'"),
        ('cluster = { scheduler = "slurm", address = "auto" }', "so leave address out"),
        ('cluster = { scheduler = "ray", train_nodes = 2 }', r"devices = 1 cannot be divided among .* train_nodes = 2"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(tmp_path: Path, lines: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(run_file(tmp_path, lines))


def test_the_ledger_may_be_apart_from_runs_on_shared_storage(tmp_path: Path) -> None:
    file = run_file(tmp_path, 'cluster = { scheduler = "slurm", ledger = "disk/ledger.sqlite" }')
    assert Context.open(file, tmp_path / "runs").workspace.ledger == tmp_path / "disk" / "ledger.sqlite"


def test_what_is_supervised_ends_although_the_first_process_was_killed(tmp_path: Path) -> None:
    """Ray's workers kill their children as they end, and nothing below them."""
    words = [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"]
    with supervised(words, tmp_path / "log", child_environment()) as child:
        first = psutil.Process(child.pid)
        until(lambda: len(first.children(recursive=True)) == 2)
        below = [process.pid for process in first.children(recursive=True)]
        os.kill(child.pid, signal.SIGKILL)
        assert all(map(is_alive, below))
    until(lambda: not any(map(is_alive, below)))


def test_a_gang_says_that_it_waits_for_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "SILENT_SECONDS", 0.01)
    notes: list[str] = []

    class Late(Here):
        """Has room once that was said."""

        @contextlib.contextmanager
        def apart(self, count: int, cards: int) -> Iterator[list[Slot]]:
            until(lambda: notes)
            yield [Slot(cards, address=THIS_MACHINE)] * count

    code = "import os; print(os.environ['NODE_RANK'], os.environ['NNODES'])"
    ended = gang.Gang(Late(), 2, notes.append).run(
        1, lambda meeting: ([sys.executable, "-c", code], meeting.variables(1)), tmp_path / "log", lambda: None
    )
    assert ended == Ended(0)
    assert notes == ["waiting for room on 2 nodes"]
    assert [(tmp_path / name).read_text() for name in ("log", "log-1")] == ["0 2\n", "1 2\n"]
