"""Several processes on one ledger, and processes that are killed: nothing is lost, nothing bought twice."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from api_server import ApiServer
from asker import FAULTS, answers, finish, requests, start, sums_agree

from stepladder.ask.ledger import Ledger

THROTTLED = {"kind": "429", "share": 0.02, "retry_after": 0.05}


def test_two_processes_share_the_work_and_the_cap(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with ApiServer(tmp_path, {"latency_s": 0.02}) as api:
        both = [start(api.url, ledger, "--count", 200, "--concurrency", 16) for _ in range(2)]
        figures = [finish(process) for process in both]
        assert api.settled()["billed"] == 200
    assert figures[0]["said"] == figures[1]["said"] == ""
    with Ledger(ledger) as opened:
        assert opened.calls("run") == 200
        assert opened.unsettled("run") == []


def test_interrupted_it_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with ApiServer(tmp_path, {"latency_s": 1.5}) as api:  # slow enough to be interrupted on a busy machine
        process = start(api.url, ledger, "--count", 2000)
        while not api.billing()["in_flight"]:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode != 0
        with Ledger(ledger) as opened:
            assert opened.unsettled("run") == []
            assert opened.calls("run") == len(api.log("delivered")) > 0
        assert api.settled()["billed"] < 2000


def test_killed_while_asking_nothing_delivered_is_lost_and_the_bill_is_covered(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    draw = random.Random(1)
    with ApiServer(tmp_path, {"latency_s": [0.005, 0.08], "faults": [THROTTLED, *FAULTS]}) as api:
        for _ in range(3):
            process = start(api.url, ledger, "--count", 600)
            time.sleep(draw.uniform(1.2, 2.2))
            process.kill()
            process.communicate()
            with Ledger(ledger) as opened:
                while opened.unsettled("run"):  # the worker takes in what was in flight
                    time.sleep(0.05)
                assert opened.spent("run") >= api.settled()["micro_dollars"]
                assert answers(opened) == len(api.log("delivered"))
                assert sums_agree(opened)
        figures = finish(start(api.url, ledger, "--count", 600))
        assert figures["said"] == ""
        assert figures["answered"] == 600
        billing = api.settled()
        assert figures["spent"] >= billing["micro_dollars"]
        again = finish(start(api.url, ledger, "--count", 600))
        assert api.settled()["billed"] == billing["billed"]
        assert again["spent"] == figures["spent"]
    with Ledger(ledger) as opened:
        assert len(opened.find_all(requests("question", 600, 64))) == 600
