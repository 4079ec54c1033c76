"""What tests share: a test server, a ledger, the model that the server serves, and the contest's data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asker
import hypothesis
import pytest
import tiny_run
from api_server import ApiServer
from made import tiny_model
from xdist.scheduler import LoadFileScheduling

from stepladder import models
from stepladder.ask.ledger import Ledger
from stepladder.config import Model
from stepladder.errors import MissingExtra

READ_PROJECT = ("test_export.py", "test_pack.py", "test_pipeline.py")
"""Files whose tests read the fixture ``project``, which takes more than a minute to make."""


hypothesis.settings.register_profile(
    "stepladder",
    deadline=None,  # speed is no matter of tests
    derandomize=True,  # the same examples everywhere: what a change breaks, it breaks on every machine
)
hypothesis.settings.register_profile("random", parent=hypothesis.settings.get_profile("stepladder"), derandomize=False)
hypothesis.settings.load_profile("stepladder")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dtype", choices=["float32", "bfloat16", "other"],
        help="what 'auto' stands for, whatever is fast here; other: not what is",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, which has the first one's environment
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(config.workerinput["workercount"])))
        return
    forced = config.getoption("--dtype")
    if forced == "other":
        forced = {"float32": "bfloat16", "bfloat16": "float32"}[models.dtype_name()]
    if forced:
        os.environ[models.DTYPE_VARIABLE] = forced  # for the commands that tests start as well


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """A file's tests share a process, and so its fixtures; the files that read the finished run share one as well."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "project" if file.endswith(READ_PROJECT) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in READ_PROJECT)  # they take longest


def pytest_report_header(config: pytest.Config) -> str:
    try:
        return f"computes in {models.dtype_name()}"
    except MissingExtra:
        return "computes nothing: PyTorch is not installed"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One server for all tests of a file: each sets the script it needs."""
    with ApiServer(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


@pytest.fixture
def model(api: ApiServer) -> Model:
    """The server without faults, as a model of the configuration."""
    api.set_script({})
    return asker.model(api.url, 8).model_copy(update={"model": "test-model"})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and the bundled tokenizer."""
    pytest.importorskip("torch")
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def contest() -> Path:
    """The folder of the contest's data, which is no part of the project: its tests skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "competition"
    if not folder.is_dir():
        pytest.skip("the contest's data is not here")
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, questions and one finished run. Tests may read it."""
    folder = tmp_path_factory.mktemp("project")
    tiny_run.make(folder)
    return folder
