"""Servers that give nothing: every wait is said, and a run stops with the reason instead of going on for ever."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from api_server import ApiServer
from asker import outcomes, request, requests
from test_engine import ask, teacher

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote import batch_calls, gate, waiting
from stepladder.ask.remote.engine import ask_all
from stepladder.ask.remote.gate import FIRST_TRIES, PROBES, TRIES
from stepladder.ask.request import worst_case
from stepladder.config import Model
from stepladder.errors import AskError, BudgetError

SCOPE = Scope("run")
PAGE = b"<!doctype html><title>Welcome to the hotel</title>"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PAUSES_SECONDS", (0.01,))
    monkeypatch.setattr("stepladder.ask.remote.jobs.BACKOFF_SECONDS", 0.01)


@contextmanager
def portal(status: int, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything with one page; its address, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in {"Content-Type": "text/html", "Content-Length": str(len(PAGE)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(PAGE)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_page_of_a_captive_portal_costs_a_few_probes_and_not_the_cap(ledger: Ledger) -> None:
    wanted = requests("portal", 400)
    worst = worst_case(wanted[0], teacher("http://a").price)
    with portal(200) as (url, asked), pytest.raises(AskError, match=rf"{url}: .*{FIRST_TRIES} times in a row") as said:
        ask(wanted, teacher(url), ledger, Scope("run", run_cap=350 * worst))
    assert len(asked) <= PROBES + FIRST_TRIES
    assert ledger.spent("run") <= (PROBES + FIRST_TRIES) * 1.1 * worst
    assert "run again to go on" in str(said.value)
    assert "text/html" in str(said.value)
    assert "Welcome to the hotel" in str(said.value)
    assert "Error" not in str(said.value)


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_is_called_one_and_not_followed(ledger: Ledger, status: int) -> None:
    with (
        portal(200) as (elsewhere, followed),
        portal(status, Location=elsewhere) as (url, asked),
        pytest.raises(AskError, match=rf"HTTP {status}.*redirects to {elsewhere}"),
    ):
        ask(requests("redirected", 100), teacher(url), ledger, SCOPE)
    assert len(asked) <= PROBES
    assert followed == []
    assert ledger.spent("run") == 0


def test_a_permanent_429_stops_the_run_with_its_reason(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "429", "retry_after": 0.01}]})
    before = api.settled()["requests"]
    with pytest.raises(AskError, match=rf"HTTP 429: The script says 429., {FIRST_TRIES} times in a row"):
        ask(requests("never", 400), teacher(api.url), ledger, SCOPE)
    assert api.settled()["requests"] - before <= PROBES + FIRST_TRIES
    api.set_script({})
    assert len(ask(requests("never", 40), teacher(api.url), ledger, SCOPE)) == 40


@pytest.mark.parametrize("fault", ["500", "disconnect_after", "malformed"])
def test_a_server_that_goes_bad_in_the_middle_is_left_after_some_tries(
    api: ApiServer, ledger: Ledger, fault: str
) -> None:
    api.set_script({"faults": [{"kind": fault, "match": "bad"}]})
    wanted = [*requests("good", 20), *requests("bad", 300)]
    with pytest.raises(AskError, match=rf"{TRIES} times in a row"):
        ask(wanted, teacher(api.url), ledger, SCOPE)
    failed = sum(count for outcome, count in outcomes(ledger).items() if outcome != "answered")
    assert TRIES <= failed < 100
    assert len(ledger.find_all(wanted)) == 20


def test_a_server_that_dies_in_the_middle_is_left_after_some_tries(
    tmp_path_factory: pytest.TempPathFactory, ledger: Ledger
) -> None:
    with ApiServer(tmp_path_factory.mktemp("dying"), {"latency_s": 0.05}) as api:
        some = teacher(api.url)

        def count(done: int, spent: int) -> None:
            if done > 10 and api.process.poll() is None:
                api.process.kill()
                api.process.wait()

        with pytest.raises(AskError, match=rf"{api.url}: cannot be reached .*, {TRIES} times in a row"):
            asyncio.run(ask_all(requests("dies", 300), some, ledger, SCOPE, Listener(count)))
    assert len(ledger.find_all(requests("dies", 300))) > 10


def test_of_two_servers_the_bad_one_is_left(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"latency_s": 0.02})
    notes: list[str] = []
    wanted = requests("two", 120)
    with portal(200) as (url, asked):
        asyncio.run(ask_all(wanted, teacher(url, api.url), ledger, SCOPE, Listener(note=notes.append)))
    assert len(ledger.find_all(wanted)) == 120
    assert len(asked) <= PROBES + FIRST_TRIES


def test_what_is_waited_for_is_said(api: ApiServer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr("stepladder.ask.remote.engine.REFRESH_SECONDS", 0.05)
    notes: list[str] = []
    listener = Listener(note=notes.append)
    api.set_script({"latency_s": 0.4})
    asyncio.run(ask_all([request("slow")], teacher(api.url), ledger, SCOPE, listener))
    api.set_script({"faults": [{"kind": "429", "retry_after": 0.5, "times": 1}]})
    asyncio.run(ask_all([request("limited")], teacher(api.url), ledger, SCOPE, listener))
    said = "\n".join(notes)
    assert re.search(rf"waiting for 1 answer of {api.url}, until \d\d:\d\d:\d\d at the latest", said)
    closed = rf"{api.url}, which is asked nothing for now \(HTTP 429: The script says 429.\), until \d\d:\d\d:\d\d$"
    assert re.search(closed, said, re.MULTILINE)


def test_the_estimate_of_a_reached_cap_leaves_out_what_could_not_be_read(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"completion_tokens": 5, "faults": [{"kind": "malformed", "share": 0.5}]})
    wanted = requests("estimate", 300)
    cap = 60 * worst_case(wanted[0], teacher("http://a").price)
    with pytest.raises(BudgetError) as said:
        ask(wanted, teacher(api.url), ledger, Scope("run", run_cap=cap))
    answered = ledger.find_all(wanted)
    mean = sum(answer.micro_dollars for answer in answered.values()) / len(answered)
    unanswered = 300 - len(answered)
    assert f"{unanswered} are not" in str(said.value)
    assert f"about ${mean * unanswered / 1e6:.4f} at what an answer cost so far" in str(said.value)


def test_a_batch_that_takes_long_and_a_provider_that_is_away_are_named(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(batch_calls, "PAUSES_SECONDS", (0.1,))
    notes: list[str] = []
    batched = RemoteModel("t", model, batch=True)
    ask_remote(requests("batch", 2), batched, ledger, SCOPE, Listener(note=notes.append))
    waited = notes.pop()
    assert waited.startswith(f"waiting for a batch at {api.url}, until ")
    away = RemoteModel("t", model.model_copy(update={"base_url": ("http://127.0.0.1:9/v1",)}), batch=True)
    with pytest.raises(AskError, match="does not answer"):
        ask_remote(requests("away", 2), away, ledger, SCOPE, Listener(note=notes.append))
    assert notes[-1].startswith("waiting for the next try to reach http://127.0.0.1:9/v1 (")
