"""How asking ends before its time: Ctrl-C once, twice, and with a kill; nothing that arrives is lost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from api_server import ApiServer
from asker import requests, rows, start
from test_engine import teacher

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote import engine, stopping
from stepladder.ask.remote.stopping import Stop
from stepladder.config import Model
from stepladder.errors import AskError

AWAITED = r"stopping: nothing more is sent; (\d+) answers? (?:is|are) awaited, until \d\d:\d\d:\d\d at the latest"


@contextmanager
def in_flight(tmp_path: Path) -> Iterator[tuple[ApiServer, subprocess.Popen[str]]]:
    """A process that asks, with answers under way that take more than a second."""
    with ApiServer(tmp_path, {"latency_s": 1.2}) as api:
        process = start(api.url, tmp_path / "ledger.sqlite", "--count", 200)
        while not api.billing()["in_flight"]:
            time.sleep(0.02)
        yield api, process


def everything_is_on_record(api: ApiServer, path: Path) -> None:
    billed = api.settled()["billed"]
    with Ledger(path) as ledger:
        while any(attempt.alive for attempt in ledger.unsettled("run")):
            time.sleep(0.02)
        assert ledger.unsettled("run") == []
        assert ledger.calls("run") == billed == len(api.log("delivered"))
        assert 0 < billed < 200


def test_one_interrupt_says_what_is_awaited_and_until_when(tmp_path: Path) -> None:
    with in_flight(tmp_path) as (api, process):
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
        assert re.search(AWAITED, said), said
        everything_is_on_record(api, tmp_path / "ledger.sqlite")


def test_a_second_interrupt_loses_nothing_that_arrives_in_time(tmp_path: Path) -> None:
    with in_flight(tmp_path) as (api, process):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
        assert re.search(
            r"stopping: \d+ answers?, worth at most .*, (?:is|are) lost if not here by \d\d:\d\d:\d\d", said
        ), said
        everything_is_on_record(api, tmp_path / "ledger.sqlite")


@pytest.mark.parametrize("times", [1, 2])
def test_a_kill_after_an_interrupt_loses_nothing(tmp_path: Path, times: int) -> None:
    with in_flight(tmp_path) as (api, process):
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        process.kill()
        process.communicate(timeout=30)
        everything_is_on_record(api, tmp_path / "ledger.sqlite")


def test_a_third_interrupt_leaves_the_worker_to_it(tmp_path: Path) -> None:
    with in_flight(tmp_path) as (api, process):
        begun = time.monotonic()
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        process.communicate(timeout=30)
        assert process.returncode != 0
        assert time.monotonic() - begun < 5
        everything_is_on_record(api, tmp_path / "ledger.sqlite")


def test_an_interrupt_while_the_worker_starts_is_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ApiServer(tmp_path) as api:
        process = start(api.url, tmp_path / "ledger.sqlite", "--count", 2000)
        while _worker(process.pid) is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode != 0
        assert api.settled()["billed"] < 2000
    assert "Traceback" not in capfd.readouterr().err


def _worker(parent: int) -> psutil.Process | None:
    """The worker of a process, once it has one."""
    for child in psutil.Process(parent).children():
        with suppress(psutil.Error):
            if "stepladder.ask.remote.worker" in child.cmdline():
                return child
    return None


def test_what_comes_too_late_after_the_second_is_charged_and_named(
    api: ApiServer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.set_script({"faults": [{"kind": "hang", "seconds": 4}]})
    notes: list[str] = []

    async def stopped_twice() -> None:
        stop = Stop()
        loop = asyncio.get_running_loop()
        loop.call_later(0.3, stop.request)
        loop.call_later(0.5, stop.request, 0.2)
        loop.call_later(0.6, stop.request)  # changes nothing
        await engine.ask_all(
            requests("late", 3), teacher(api.url), ledger, Scope("run"), Listener(note=notes.append), stop
        )

    begun = time.monotonic()
    with pytest.raises(AskError, match="stopped before all requests were answered"):
        asyncio.run(stopped_twice())
    assert time.monotonic() - begun < 3
    worst = ledger.spent("run")
    assert worst > 0
    assert notes[-1].startswith(f"stopping: 3 answers, worth at most ${worst / 1e6:.4f}, are lost if not here by ")
    assert rows(ledger, "SELECT outcome, charged, COUNT(*) FROM attempts GROUP BY 1, 2") == [(None, None, 3)]


def test_a_request_that_was_not_sent_yet_when_the_stop_came_costs_nothing(
    api: ApiServer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.set_script({})
    stop = Stop()
    reserve = Ledger.reserve

    def reserve_and_stop(*given: object, **named: object) -> object:
        stop.request()
        return reserve(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "reserve", reserve_and_stop)
    before = api.settled()["requests"]
    with pytest.raises(AskError, match="stopped"):
        asyncio.run(engine.ask_all(requests("never", 3), teacher(api.url), ledger, Scope("run"), stop=stop))
    assert api.settled()["requests"] == before
    assert ledger.spent("run") == 0
    assert ledger.unsettled("run") == []


def test_a_worker_that_is_killed_is_one_line(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.set_script({"latency_s": 0.05})

    def kill(done: int, spent: int) -> None:
        if done > 3 and (worker := _worker(os.getpid())) is not None:
            worker.kill()

    with pytest.raises(AskError, match=r"model 't': the process that sends requests was killed .*SIGKILL.* run again"):
        ask_remote(requests("killed", 400), RemoteModel("t", model), ledger, Scope("run"), Listener(kill))
    assert len(ask_remote(requests("killed", 400), RemoteModel("t", model), ledger, Scope("run"))) == 400


def test_stopping_is_asked_for_once() -> None:
    stop = Stop()
    heard: list[int] = []
    stop.listen(lambda: heard.append(1))
    assert not stop.requested
    stop.request()
    stop.request(5)
    assert stop.deadline is not None
    first = stop.deadline
    stop.request(50)
    stop.request()
    assert (stop.requested, stop.deadline) == (True, first)
    assert len(heard) == 4
    assert stopping.GRACE_SECONDS == 5
