"""``[track]``: what trackers are passed, and real ones that get it: an MLflow server on this machine, Trackio's and
Weights & Biases' files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from made import run_file
from test_report import built, context  # noqa: F401 (a fixture)

from stepladder.commands import run
from stepladder.config import Track
from stepladder.context import Context
from stepladder.reporting import tracking
from stepladder.reporting.content import Report
from stepladder.serving.probe import free_port

STARTUP_SECONDS = 120.0


@pytest.fixture
def folder(context: Context) -> Path:  # noqa: F811
    """With a report."""
    return built(context)


def test_curves_have_a_value_a_member_and_step_and_figures_a_name(folder: Path) -> None:
    report = Report.read(folder)
    steps = tracking.curves(report)
    assert [*steps] == [1, 2, 3, 4]
    assert steps[2] == {f"{member}/{name}": value for member in ("m1", "m2") for name, value in
                        (("loss", 1.0), ("learning_rate", 1e-4))}  # fmt: skip
    figures = tracking.figures(report)
    assert figures["test/4-bit m2"] == 1.0
    assert figures["test/ensemble"] == 0.875
    assert figures["cost/dollars"] == 1.25


def test_a_tracker_gets_a_report_once_and_another_one_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, got = Report.read(folder), []
    monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda _, page, folder, project: got.append(project))
    for project in ("one", "one", "two"):
        tracking.pass_on(report, folder / "report.html", folder, Track(to="wandb", project=project))
    assert got == ["one", "two"]


def test_a_tracker_that_fails_is_told_of_in_a_line_and_tried_again(
    context: Context,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    context.input("report").mkdir()
    report_folder = built(context)
    (context.input("report") / "report.html").write_bytes((report_folder / "report.html").read_bytes())

    def fail(*_: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", fail)
    run.pass_on(context, Report.read(report_folder), Track(to="mlflow"))
    said = context.progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert "mlflow did not take the report (ConnectionError: no route)" in " ".join(said.split())
    assert not (context.workspace.folder / tracking.PassedOn.FILE).exists()


def test_a_library_that_is_missing_is_named_before_anything_runs(tmp_path: Path) -> None:
    config = run_file(tmp_path, '[track]\nto = "trackio"\n')
    code = "import sys; sys.modules['trackio'] = None; from stepladder.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(config), "--runs", str(tmp_path / "runs")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "trackio is not installed: pip install trackio" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.track
@pytest.mark.filterwarnings("ignore")
def test_an_mlflow_server_shows_curves_figures_and_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--artifacts-destination", str(tmp_path)]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *store]
    server = subprocess.Popen([*words, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"{url}/health")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        report = Report.read(folder)
        assert tracking.pass_on(report, folder / "report.html", tmp_path, Track(to="mlflow", project="p"))
        experiment = ask(f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=p")["experiment"]
        search = json.dumps({"experiment_ids": [experiment["experiment_id"]]}).encode()
        (shown,) = ask(f"{url}/api/2.0/mlflow/runs/search", search)["runs"]
        metrics = {metric["key"]: metric["value"] for metric in shown["data"]["metrics"]}
        assert metrics["test/4-bit m2"] == 1.0
        run_id = shown["info"]["run_id"]
        history = ask(f"{url}/api/2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key=m1/loss")["metrics"]
        assert [(row["step"], row["value"]) for row in history] == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
        (page,) = ask(f"{url}/api/2.0/mlflow/artifacts/list?run_id={run_id}")["files"]
        assert page["path"] == "report.html"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.track
@pytest.mark.parametrize("to", ["trackio", "wandb"])
def test_a_tracker_without_a_server_keeps_it_in_files(folder: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "home").mkdir()
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path / "home"),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    code = (
        "import sys; from pathlib import Path; from stepladder.config import Track; "
        "from stepladder.reporting import tracking; from stepladder.reporting.content import Report; "
        "folder = Path(sys.argv[1]); report = Report.read(folder); "
        "assert tracking.pass_on(report, folder / 'report.html', folder, Track(to=sys.argv[2], project='p'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), to], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    if to == "wandb":
        assert [*folder.glob("wandb/offline-run-*/run-*.wandb")]
    else:
        (kept,) = (tmp_path / "trackio").glob("p*.db")
        listed = subprocess.run(
            [sys.executable, "-m", "trackio.cli", "list", "metrics", "--project", "p", "--run", "tiny", "--json"],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        assert {"m1/loss", "m2/loss", "test/4-bit m2"} <= {*json.loads(listed.stdout)["metrics"]}, kept


def ask(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 (loopback)
    with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
        return json.load(reply)


def wait_for(url: str) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
