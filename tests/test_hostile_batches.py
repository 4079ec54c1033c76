"""What a hostile, broken or merely different batch API may say: no line blocks the others, nothing is bought twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_hostile import http
from api_server import ApiServer
from asker import outcomes, requests, rows
from raw_server import Raw

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.outcome import Delivery, Unreachable
from stepladder.ask.remote import batch, batch_api, batch_calls, batch_results
from stepladder.ask.remote.batch_api import BatchApi, Refused
from stepladder.ask.remote.batch_lines import read_line
from stepladder.ask.request import worst_case
from stepladder.config import Model
from stepladder.errors import AskError

SCOPE = Scope("run", "medium")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_calls, "PAUSES_SECONDS", (0.01,) * 4)
    monkeypatch.setattr(batch_calls, "LISTING_WAIT_SECONDS", 0.01)


BODY = {"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}]}
STRAYS = {
    "infinite": b'{"custom_id": Infinity, "response": {"status_code": 200, "body": {}}}',
    "no number": b'{"custom_id": NaN, "response": null}',
    "fraction": b'{"custom_id": 1.5, "response": null}',
    "number": b'{"custom_id": 1, "response": null}',
    "boolean": b'{"custom_id": true, "response": null}',
    "wide": '{"custom_id": "１", "response": null}'.encode(),
    "signed": b'{"custom_id": "+1", "response": null}',
    "long": b'{"custom_id": "' + b"9" * 5000 + b'", "response": null}',
    "deep": b'{"custom_id": ' + b"[" * 100_000,
    "list": b"[" * 100_000 + b"]" * 100_000,
    "no line": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_line_without_an_id_of_ours_is_a_stray(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And the lines beside it are answers."""
    number, _ = read_line(STRAYS[name])
    assert number is None
    content = BatchApi.content
    monkeypatch.setattr(
        BatchApi, "content", lambda *arguments: STRAYS[name] + b"\n" + content(*arguments) + STRAYS[name] + b"\n"
    )
    found = ask_remote(requests(f"stray {name}", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert len(found) == 3
    assert outcomes(ledger) == {"answered": 3}
    (stray,) = rows(ledger, "SELECT stray FROM batches")
    assert stray[0] == 2 * (STRAYS[name] + b"\n")


@pytest.mark.parametrize("status", ["Infinity", "1e400", "true", '"200"', "-1", "1" * 5000, "null", "[]"])
def test_a_line_of_ours_that_says_nothing_readable_is_kept_and_charged(status: str) -> None:
    line = f'{{"custom_id": "7", "response": {{"status_code": {status}, "body": {{}}}}}}'.encode()
    assert read_line(line) == (7, Delivery(200, line))


def test_a_lone_surrogate_in_a_line_costs_no_answer() -> None:
    line = json.dumps({"custom_id": "7", "response": {"status_code": 200, "body": {**BODY, "x": "\ud800"}}})
    number, delivery = read_line(line.encode())
    assert (number, delivery.status) == (7, 200)
    assert json.loads(delivery.body)["choices"] == BODY["choices"]


def test_a_wrong_clock_buys_no_batch_twice(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock is hours ahead of the provider's, and the provider's reply to the new batch is lost."""
    api.set_script({"faults": [{"kind": "batch_lost", "times": 1}]})
    now = time.time
    monkeypatch.setattr("stepladder.ask.ledger.batches.time.time", lambda: now() + 5 * 3600)
    before = api.settled()
    wanted = requests("early", 10)
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)) == 10
    assert api.settled()["billed"] - before["billed"] == 10
    assert len(rows(ledger, "SELECT 1 FROM batches")) == 1
    assert all(seconds >= 0 for (seconds,) in rows(ledger, "SELECT seconds FROM attempts"))


def test_what_was_uploaded_is_deleted_and_the_rest_expires(api: ApiServer, ledger: Ledger, model: Model) -> None:
    ask_remote(requests("files", 3), RemoteModel("t", model, batch=True), ledger, SCOPE)
    listed = api.call("GET", "/v1/files?limit=100").json["data"]
    assert {file["purpose"] for file in listed} == {"batch_output"}
    newest = api.call("GET", "/v1/batches").json["data"][0]
    assert newest["output_expires_after"] == {"anchor": "created_at", "seconds": batch_api.FILE_LIFETIME_SECONDS}
    with pytest.raises(AskError, match="the provider refused the batch"):
        other = model.model_copy(update={"model": "other"})
        ask_remote(requests("files", 4), RemoteModel("t", other, batch=True), ledger, SCOPE)
    listed = api.call("GET", "/v1/files?limit=100").json["data"]
    assert {file["purpose"] for file in listed} == {"batch_output"}


def test_a_file_that_cannot_be_deleted_costs_nothing(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(self: BatchApi, file: str) -> None:
        raise Unreachable("reset")

    monkeypatch.setattr(BatchApi, "delete", no)
    assert len(ask_remote(requests("kept", 2), RemoteModel("t", model, batch=True), ledger, SCOPE)) == 2


def test_a_result_file_that_is_gone_does_not_block_the_next_run(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests("gone", 2)
    with monkeypatch.context() as patch:
        patch.setattr(BatchApi, "content", lambda self, file, limit: self._fetch("GET", "/files/none/content", limit))
        patch.setattr(batch_results, "MAX_ATTEMPTS", 1)
        with pytest.raises(AskError, match="the provider lost the batch"):
            ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert ledger.unfinished_batches("run") == []
    assert model.price is not None
    assert ledger.spent("run") == 2 * worst_case(wanted[0], model.price.in_batch())
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)) == 2


def test_a_file_longer_than_all_answers_may_be_is_read_no_further(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    content = BatchApi.content
    monkeypatch.setattr(batch_results, "MAX_STRAY_BYTES", 1000)
    monkeypatch.setattr(batch, "MIN_RESULT_BYTES", 1000)

    def padded(self: BatchApi, file: str, limit: int) -> bytes:
        limits.append(limit)
        return (content(self, file, limit) + b"x" * 10_000_000)[:limit]

    monkeypatch.setattr(BatchApi, "content", padded)
    wanted = requests("padded", 2)
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)) == 2
    assert limits == [2 * sum(one.reply_bound for one in wanted)]
    assert rows(ledger, "SELECT LENGTH(stray) FROM batches") == [(1000,)]


def test_a_usage_that_is_not_believed_is_flagged_in_a_batch_too(api: ApiServer, ledger: Ledger, model: Model) -> None:
    api.set_script({"faults": [{"kind": "no_usage"}]})
    notes: list[str] = []
    listener = Listener(note=notes.append)
    ask_remote(requests("free", 3), RemoteModel("t", model, batch=True), ledger, SCOPE, listener)
    assert len(notes) == 1
    assert "charged at the worst case: the server does not say" in notes[0]


# The API itself


@pytest.fixture
def files() -> Iterator[Callable[[Raw], BatchApi]]:
    opened: list[BatchApi] = []

    def open_(server: Raw) -> BatchApi:
        opened.append(BatchApi(server.url, "a-long-key", 5))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


def page(*batches: Any, more: object = False) -> bytes:
    return http(json.dumps({"data": batches, "has_more": more}).encode())


ODD: list[Any] = [None, 5, [], {}, {"id": 5, "status": "completed"}, {"id": "b", "status": ["completed"]}]
FINE = {"id": "batch_1", "status": "completed", "metadata": {"stepladder_intent": "i"}}


def test_an_odd_record_hides_no_other(files: Callable[[Raw], BatchApi]) -> None:
    with Raw(lambda head, body: page(*ODD, FINE, *ODD)) as server:
        assert [(found.id, found.intent) for found in files(server).list_batches()] == [("batch_1", "i")]


def test_a_list_of_batches_ends(files: Callable[[Raw], BatchApi], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it gives the same page again and again, and where it always has another one: then it is not known whether
    the batch is in it, and none is made."""
    with Raw(lambda head, body: page(FINE, more=True)) as server:
        assert len(list(files(server).list_batches())) == 2
    monkeypatch.setattr(batch_api, "MAX_PAGES", 20)
    count = iter(range(10**6))
    endless = Raw(lambda head, body: page({**FINE, "id": f"b{next(count)}"}, more=True))
    with endless as server, pytest.raises(Unreachable, match="does not end"):
        list(files(server).list_batches())


@pytest.mark.parametrize(
    "odd",
    [
        {"metadata": [], "request_counts": 5, "errors": {"data": {"message": "x"}}},
        {"metadata": {"stepladder_intent": 5}, "request_counts": {"completed": 1e999}, "errors": {"data": [5, None]}},
        {"request_counts": {"completed": -1}, "errors": {"data": [{"message": 5}]}, "output_file_id": None},
    ],
)
def test_what_is_odd_in_a_record_is_left_out(files: Callable[[Raw], BatchApi], odd: dict[str, Any]) -> None:
    with Raw(lambda head, body: http(json.dumps({"id": "b", "status": "failed", **odd}).encode())) as server:
        found = files(server).retrieve("b")
    assert (found.intent, found.completed, found.reasons, found.result_files) == (None, 0, (), ())


@pytest.mark.parametrize(
    "reply",
    [
        http(b"[" * 100_000), http(b"5"), http(b"{}"), http(b'{"id": 5, "status": "completed"}'), b"no http\r\n", b"",
        http(b'{"id": "b", "status": null}'), http(b'{"id": "\\ud800", "status": "x"}'), http(b"{}", 500),
        http(b'{"id": "b\\u001b]52;", "status": "completed"}'),
    ],
)  # fmt: skip
def test_a_reply_that_is_no_record_may_be_asked_for_again(files: Callable[[Raw], BatchApi], reply: bytes) -> None:
    with Raw(lambda head, body: reply) as server:
        with pytest.raises(Unreachable):
            files(server).retrieve("b")
        if b"null" not in reply:  # the record of a new batch needs no more than an id
            with pytest.raises(Unreachable):
                files(server).create("f", "i")


def test_an_id_is_a_name_and_no_path(files: Callable[[Raw], BatchApi]) -> None:
    with Raw(lambda head, body: http(json.dumps(FINE).encode())) as server:
        files(server).retrieve("../../admin?x=1#")
        assert server.heads[0].startswith("GET /v1/batches/..%2F..%2Fadmin%3Fx%3D1%23 HTTP")


def test_a_provider_that_knows_no_expiry_is_asked_without(files: Callable[[Raw], BatchApi]) -> None:
    def strict(head: str, body: bytes) -> bytes:
        return (
            http(b'{"error": {"message": "unknown field"}}', 400) if b"expires_after" in body else http(b'{"id": "x"}')
        )

    with Raw(strict) as server:
        assert files(server).upload(b"{}\n") == "x"
        assert files(server).create("f", "i") == "x"
        assert len(server.bodies) == 4
    echo = http(b'{"error": {"message": "a-long-key is no key"}}', 400)
    with Raw(lambda head, body: echo) as server, pytest.raises(Refused, match=r"HTTP 400: \[api key\] is no key"):
        files(server).create("f", "i")


def test_a_redirect_takes_no_file_anywhere(files: Callable[[Raw], BatchApi]) -> None:
    with Raw(lambda head, body: http(b'{"id": "x"}')) as other:
        moved = http(b"", 308, Location=f"{other.url}/files")
        with Raw(lambda head, body: moved) as server, pytest.raises(Refused, match="HTTP 308: it redirects to"):
            files(server).upload(b"{}\n")
        assert other.heads == []


def test_batches_go_to_no_proxy_and_carry_no_organisation(
    files: Callable[[Raw], BatchApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-somebody")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-of-somebody")
    with (
        Raw(lambda head, body: http(b"no", 502)) as proxy,
        Raw(lambda head, body: http(json.dumps(FINE).encode())) as server,
    ):
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert files(server).retrieve("b").id == "batch_1"
        assert proxy.heads == []
        assert "of-somebody" not in server.heads[0]


def test_a_file_that_drips_is_given_up(files: Callable[[Raw], BatchApi], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(0, 10**7, 1000))
    monkeypatch.setattr("stepladder.ask.remote.wire.time.monotonic", lambda: next(clock))
    with Raw(lambda head, body: http(b"x" * 1000)) as server, pytest.raises(Unreachable, match="bytes in"):
        files(server).content("f", 10_000)
