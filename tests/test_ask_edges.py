"""The corners of asking: what rarely happens, and must not go wrong when it does."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import asker
import pytest
from api_server import ApiServer
from asker import requests

from stepladder import models
from stepladder.ask import RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.outcome import Delivery, Unreachable, judge
from stepladder.ask.remote import batch_calls
from stepladder.ask.remote.admission import FREE, PROBE, Admission
from stepladder.ask.remote.batch_api import BatchApi, Gone, Refused
from stepladder.ask.remote.engine import ask_all
from stepladder.ask.remote.openai_http import Http, chat_body
from stepladder.ask.remote.servers import Endpoint
from stepladder.ask.remote.teacher import priced_model
from stepladder.ask.request import Request, Response, worst_case
from stepladder.config import Model
from stepladder.errors import AskError, BudgetError, MissingExtra, UserError
from stepladder.models import template
from stepladder.text import USUAL_CONTROL_TOKENS

SCOPE = Scope("run", "easy")


def run(wanted: list[Request], model: Model, ledger: Ledger, scope: Scope = SCOPE) -> dict[str, Response]:
    """In this process, without a worker."""
    asyncio.run(ask_all(wanted, priced_model(RemoteModel("t", model)), ledger, scope))
    return ledger.find_all(wanted)


# A server that says odd things where the protocol says others


class Odd:
    """An HTTP server that answers every request in one way."""

    def __init__(self, status: int, body: bytes, wait: float = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(wait)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Odd:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def told(url: str, what: str, timeout: float = 5) -> Any:
    async def go() -> Any:
        connection = Http(url, "m", "k", timeout)
        try:
            return await (connection.models() if what == "models" else connection.tokens(()))
        finally:
            await connection.close()

    return asyncio.run(go())


@pytest.mark.parametrize("what", ["models", "tokens"])
@pytest.mark.parametrize(("status", "body"), [(404, b"{}"), (200, b"not JSON"), (200, b'{"data": 5, "tokens": 5}')])
def test_a_server_that_does_not_say_who_it_is_says_nothing(what: str, status: int, body: bytes) -> None:
    with Odd(status, body) as odd:
        assert told(odd.url, what) is None


def test_a_server_that_fails_or_hangs_may_be_asked_again() -> None:
    with Odd(503, b"{}") as odd, pytest.raises(Unreachable, match="HTTP 503"):
        told(odd.url, "models")
    with Odd(200, b"{}", wait=0.5) as odd, pytest.raises(Unreachable):
        told(odd.url, "tokens", timeout=0.1)
    with pytest.raises(Unreachable):
        told("http://127.0.0.1:9/v1", "models")


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [(503, b"{}", Unreachable), (200, b"not JSON", Unreachable), (404, b"{}", Gone), (401, b"{}", Refused)],
)
def test_a_batch_api_that_says_no_or_nothing(status: int, body: bytes, error: type[Exception]) -> None:
    with Odd(status, body) as odd:
        files = BatchApi(odd.url, "k", 5)
        with pytest.raises(error):
            files.upload(b"{}\n")
        files.close()
    files = BatchApi("http://127.0.0.1:9/v1", "k", 5)
    with pytest.raises(Unreachable):
        list(files.list_batches())
    files.close()


def test_settings_go_over_the_wire_as_they_are_meant() -> None:
    request = asker.request("x", 9).model_copy(update={"top_p": 0.5, "top_logprobs": 3, "temperature": 0.7})
    assert chat_body(request, "m", "max_completion_tokens", USUAL_CONTROL_TOKENS) == {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0.7,
        "max_completion_tokens": 9,
        "top_p": 0.5,
        "logprobs": True,
        "top_logprobs": 3,
    }


@pytest.mark.parametrize(
    ("library", "make"),
    [("aiohttp", lambda: Http("http://x", "m", "k", 1)), ("openai", lambda: BatchApi("http://x", "k", 1))],
)
def test_without_its_library_there_is_a_line_on_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, library: str, make: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"{library} is not installed: pip install 'stepladder\[api\]'"):
        make()


def test_log_probabilities_that_cannot_be_read_cost_no_answer() -> None:
    body = b'{"choices": [{"message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": [{}]}}]}'
    outcome = judge(asker.request("x"), Delivery(200, body), asker.PRICE)
    assert outcome.response is not None
    assert (outcome.response.text, outcome.response.logprobs) == ("A", ())


# The front door


def test_no_key_no_price_no_request(model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASKER_KEY")
    with pytest.raises(AskError, match="environment variable ASKER_KEY is not set"):
        ask_remote(requests("no key", 1), RemoteModel("t", model), ledger, SCOPE)
    with pytest.raises(AskError, match="has no price"):
        priced_model(RemoteModel("t", model.model_copy(update={"price": None})))


def test_a_server_that_wants_no_key_gets_a_word_for_one(api: ApiServer, model: Model, ledger: Ledger) -> None:
    with pytest.raises(AskError, match="HTTP 401"):
        ask_remote(
            requests("keyless", 1), RemoteModel("t", model.model_copy(update={"api_key_env": None})), ledger, SCOPE
        )


def test_a_worker_that_breaks_down_is_a_bug_and_says_so(
    model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the worker process ended with code 1"):
        ask_remote(requests("broken", 1), RemoteModel("t", model), ledger, SCOPE)


def test_weights_at_hand_say_how_a_prompt_must_look(api: ApiServer, model: Model, ledger: Ledger) -> None:
    tokens = template.prompt_tokens(models.load_tokenizer(models.locate(models.BUNDLED)), PROBE)
    own = model.model_copy(update={"price": FREE, "path": models.BUNDLED})
    api.set_script({"tokens": tokens, "prompt_tokens": len(tokens)})
    assert len(ask_remote(requests("same", 2), RemoteModel("t", own), ledger, SCOPE)) == 2
    api.set_script({"tokens": [*tokens[:-1], 0], "prompt_tokens": len(tokens)})
    with pytest.raises(AskError, match=f"prompt token {len(tokens) - 1} is "):
        ask_remote(requests("other", 2), RemoteModel("t", own), ledger, SCOPE)


# The engine


def test_a_request_that_is_always_told_to_wait_is_given_up(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepladder.ask.remote.engine.MAX_THROTTLED", 3)
    api.set_script({"faults": [{"kind": "429", "retry_after": 0.01}]})
    with pytest.raises(AskError, match=r"1 requests got no answer .*HTTP 429"):
        run(requests("wait", 1), model, ledger)


def test_a_cut_answer_gets_its_second_chance_from_a_later_run(api: ApiServer, model: Model, ledger: Ledger) -> None:
    (wanted,) = requests("cut", 1)
    cut = Response(text="so", finish="length", max_tokens=16, prompt_tokens=1, completion_tokens=16)
    ledger.store("run", [(wanted, cut)])
    assert run([wanted], model, ledger)[wanted.key].finished


def test_two_caps_in_flight_are_one_request(api: ApiServer, model: Model, ledger: Ledger) -> None:
    """The smaller is asked first and cut off; the larger is what is asked next, not twice the smaller."""
    api.set_script({"completion_tokens": 40, "latency_s": 0.1})
    small, large = asker.request("caps", 16), asker.request("caps", 64)
    assert run([small, large], model, ledger)[small.key].max_tokens == 64


def test_a_request_given_up_is_not_asked_again_in_the_same_call(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepladder.ask.remote.jobs.CHUNK", 2)
    api.set_script({"faults": [{"kind": "400", "match": "worse"}]})
    before = api.settled()["requests"]
    good, worse = requests("good", 30), asker.request("worse")

    def source() -> Iterator[Request]:
        yield from good[:10]
        yield worse
        for request in good[10:]:
            time.sleep(0.01)
            yield request
        yield worse

    with pytest.raises(AskError, match="1 requests got no answer"):
        asyncio.run(ask_all(source(), priced_model(RemoteModel("t", model)), ledger, SCOPE))
    assert api.settled()["requests"] - before == 31


def test_what_the_budget_leaves_over_is_counted_to_the_end(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepladder.ask.remote.jobs.CHUNK", 5)
    api.set_script({"completion_tokens": "cap", "prompt_tokens": 300})
    wanted = requests("left", 40)
    assert model.price is not None
    worst = worst_case(wanted[0], model.price)
    with pytest.raises(BudgetError) as stopped:
        run([*wanted, *wanted[-2:]], model, ledger, SCOPE._replace(run_cap=3 * worst))
    answered = len(ledger.find_all(wanted))
    assert 0 < answered < 40
    assert f"{answered} requests are answered and kept, {40 - answered} are not" in str(stopped.value)


def test_a_ledger_that_cannot_be_written_stops_the_run(model: Model, ledger: Ledger) -> None:
    with sqlite3.connect(ledger.path) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON attempts BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    db.close()
    with pytest.raises(sqlite3.IntegrityError, match="disk full"):
        run(requests("full", 3), model, ledger)


def test_whoever_waits_for_a_commit_that_cannot_begin_is_told(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def no() -> None:
        raise sqlite3.OperationalError("database is locked")

    async def go() -> None:
        async with Committer(ledger) as committer:
            monkeypatch.setattr(ledger, "begin", no)
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                await committer.write(lambda opened: opened.spent("run"))

    asyncio.run(go())


# Servers of one's own


def test_a_probe_that_fails_is_tried_again(api: ApiServer, model: Model, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "500", "times": 1}]})
    door = Admission("weights", "test-model", None, "run")
    asyncio.run(ask_all(requests("again", 2), priced_model(RemoteModel("t", model), door), ledger, SCOPE))
    assert len(ledger.find_all(requests("again", 2))) == 2


def test_a_server_that_hangs_up_shows_again_who_it_is(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is refused once in the middle of a run: it is probed a second time."""
    send, sent = Http.send, list[str]()

    async def once(self: Http, request: Request, key: str) -> Delivery:
        sent.append(request.messages[-1].content)
        if sent.count("away 0") == 1 and sent[-1] == "away 0":
            return Delivery(error="refused", sent=False)
        return await send(self, request, key)

    monkeypatch.setattr(Http, "send", once)
    some = priced_model(RemoteModel("t", model), Admission("weights", "test-model", None, "run"))
    asyncio.run(ask_all(requests("away", 3), some, ledger, SCOPE))
    assert sum(text.startswith("Ann sits") for text in sent) == 2
    endpoint: Endpoint = some.servers()[0]
    assert dataclasses.is_dataclass(endpoint)


# Batches


def test_a_batch_whose_making_is_never_confirmed_is_left_for_the_next_run(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_calls, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(batch_calls, "LISTING_WAIT_SECONDS", 0.0)

    def nobody(self: BatchApi, file: str, intent: str) -> str:
        raise Unreachable("reset")

    with monkeypatch.context() as patch:
        patch.setattr(BatchApi, "create", nobody)
        with pytest.raises(AskError, match="did not reply whether it made the batch"):
            ask_remote(requests("unsure", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert [row.requests for row in ledger.unfinished_batches("run")] == [3]
    assert len(ask_remote(requests("unsure", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(BatchApi, "retrieve", lambda self, name: nobody(self, name, ""))
        with pytest.raises(AskError, match=r"does not answer \(reset\); nothing is lost, run again"):
            ask_remote(requests("unseen", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert len(ask_remote(requests("unseen", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)) == 3


def test_a_batch_of_another_process_is_waited_for(
    api: ApiServer, model: Model, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_calls, "PAUSES_SECONDS", (0.02,))
    wanted = requests("theirs", 4)
    assert model.price is not None
    half, price = model.price.in_batch(), asker.PRICE
    with Ledger(ledger.path) as other:
        other.begin_session()
        with other.transaction():
            theirs = other.open_batch(SCOPE, api.url, "test-model ASKER_KEY", half)
            grants = [other.reserve(request, half, SCOPE, "t", api.url, theirs) for request in wanted]
        answered = Response(text="A", max_tokens=16, prompt_tokens=1, completion_tokens=1)
        body = b'{"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}]}'

        def collect() -> None:
            with other.transaction():
                for grant, request in zip(grants, wanted, strict=True):
                    delivery = Delivery(200, body)
                    other.settle(grant, request, SCOPE, delivery, judge(request, delivery, price), 1.0)  # type: ignore[arg-type]
                other.end_batch(theirs, "completed")

        threading.Timer(0.3, collect).start()
        before = api.settled()["billed"]
        found = ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
        assert {answer.text for answer in found.values()} == {answered.text}
        assert api.settled()["billed"] == before


def test_a_fatal_line_stops_the_batches(api: ApiServer, model: Model, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "403", "match": "fatal 1"}]})
    with pytest.raises(AskError, match=r"HTTP 403.*no further batch is made, and what was answered is kept"):
        ask_remote(requests("fatal", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert len(ledger.find_all(requests("fatal", 3))) == 2


def test_a_refused_prompt_is_final_in_a_batch_too(api: ApiServer, model: Model, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "400", "match": "long 1", "code": "context_length_exceeded"}]})
    found = ask_remote(requests("long", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert sorted(answer.finish for answer in found.values()) == ["refused", "stop", "stop"]


def test_a_refusal_does_not_hide_what_was_cut_off(ledger: Ledger) -> None:
    (wanted,) = requests("cut", 1)
    cut = Response(text="so", finish="length", max_tokens=16, prompt_tokens=1, completion_tokens=16)
    refused = Response(text="", finish="refused", max_tokens=32, prompt_tokens=0, completion_tokens=0)
    ledger.store("run", [(wanted, cut)])
    ledger.store("run", [(wanted, refused)])
    assert ledger.find(wanted) == cut


def test_a_batch_is_polled_less_and_less_often() -> None:
    pauses = batch_calls.pauses()
    assert [next(pauses) for _ in range(9)][-3:] == [60, 60, 60]


# The ledger's file


def test_a_ledger_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be opened"):
        Ledger(tmp_path / "file" / "ledger.sqlite")
    (tmp_path / "junk.sqlite").write_text("This is no database, and long enough to be looked at as one. " * 20)
    with pytest.raises(UserError, match="not a usable ledger"):
        Ledger(tmp_path / "junk.sqlite")
    with Ledger(tmp_path / "new.sqlite"):
        pass
    with sqlite3.connect(tmp_path / "new.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match="written by a newer Stepladder"):
        Ledger(tmp_path / "new.sqlite")


def test_a_transaction_is_all_or_nothing(ledger: Ledger) -> None:
    (wanted,) = requests("half", 1)
    answer = Response(text="A", max_tokens=16, prompt_tokens=1, completion_tokens=1)
    with pytest.raises(RuntimeError), ledger.transaction():
        ledger.keep("run", wanted, answer)
        raise RuntimeError
    assert ledger.find(wanted) is None


def test_whether_a_process_lives_is_told_by_its_lock(ledger: Ledger) -> None:
    ledger.begin_session()
    assert ledger._is_alive(ledger._session or 0)
    assert not ledger._is_alive(12345)
    file = ledger._session_file(777)
    handle = os.open(file, os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert ledger._is_alive(777)
    os.close(handle)
    assert not ledger._is_alive(777)
    assert not file.exists()


def test_answers_of_weights_are_exported_too(ledger: Ledger) -> None:
    (wanted,) = requests("own", 1)
    ledger.store("run", [(wanted, Response(text="A", max_tokens=16, prompt_tokens=1, completion_tokens=1))])
    (row,) = ledger.export()
    assert (row["text"], row["request"]["messages"][0]["content"]) == ("A", "own 0")
