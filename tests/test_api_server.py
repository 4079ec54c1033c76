"""The test server itself: an oracle of billing that is wrong would pass a client that is."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from api_script import BATCHES, LINES, REFUSALS, SHAPES, WIRE
from api_server import Answer, ApiServer

CHAT = "/v1/chat/completions"
FREE = {"disconnect_before", *REFUSALS}
TESTED = REFUSALS | SHAPES | WIRE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One process for most tests; each says what it wants with set_script and asks about words of its own."""
    with ApiServer(tmp_path_factory.mktemp("api")) as api:
        yield api


def body(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "test-model", "messages": [{"role": "user", "content": text}], **more}


def chat(api: ApiServer, text: str = "hi", timeout: float = 10, key: str = "", **more: Any) -> Answer:
    headers = {"Idempotency_Key": key} if key else {}
    return api.call("POST", CHAT, json.dumps(body(text, **more)), timeout, **headers)


def events(api: ApiServer, since: int) -> list[str]:
    api.settled()
    return [entry["event"] for entry in api.log()[since:]]


def one_fault(api: ApiServer, kind: str, **parameters: Any) -> int:
    """Strike everything with it from now on; how long the log is before."""
    api.set_script({"faults": [{"kind": kind, **parameters}]})
    return len(api.log())


def test_an_answer_is_told_billed_and_delivered(server: ApiServer) -> None:
    server.set_script({"headers": {"x-extra": "yes"}})
    before = server.billing()
    answer = chat(server, "How many legs has a spider? " * 3, seed=7, key="k-1")
    assert answer.status == 200
    assert answer.headers["x-extra"] == "yes"
    assert answer.json["object"] == "chat.completion"
    choice = answer.json["choices"][0]
    assert choice["message"]["content"] == "echo How many legs has a spider? How many leg #7\nAnswer: A"
    assert choice["finish_reason"] == "stop"
    assert answer.json["usage"] == {"prompt_tokens": 22, "completion_tokens": 8, "total_tokens": 30}
    billed, delivered = server.log()[-2:]
    sent = json.dumps(body("How many legs has a spider? " * 3, seed=7))
    assert billed["event"] == "billed"
    assert billed["body_sha256"] == sha256(sent.encode()).hexdigest()
    assert (billed["idempotency_key"], billed["micro_dollars"], billed["fault"]) == ("k-1", 22 * 1 + 8 * 2, None)
    assert (delivered["event"], delivered["n"]) == ("delivered", billed["n"])
    after = server.billing()
    assert after["micro_dollars"] - before["micro_dollars"] == 38
    assert (after["billed"] - before["billed"], after["in_flight"]) == (1, 0)
    assert after["max_in_flight"] >= 1


@pytest.mark.parametrize(
    ("price", "prompt", "completion", "expected"),
    [
        ({"input": 0.1, "output": 0}, 3, 1, 1),  # 0.30000000000000004 either way
        ({"input": 1.1, "output": 0}, 10, 1, 11),  # 11.000000000000002 in floats
        ({"input": 0.15, "output": 0.6}, 1001, 333, math.ceil((1001 * 15 + 333 * 60) / 100)),
        ({"input": 0, "output": 0}, 10, 10, 0),
    ],
)
def test_a_bill_is_exact_and_rounded_up_once(
    server: ApiServer, price: dict[str, float], prompt: int, completion: int, expected: int
) -> None:
    server.set_script({"price": price, "prompt_tokens": prompt, "completion_tokens": completion})
    chat(server, "what does it cost")
    assert server.log("billed")[-1]["micro_dollars"] == expected


def test_the_cap_ends_an_answer(server: ApiServer) -> None:
    server.set_script({"completion_tokens": 100})
    caps: list[dict[str, Any]] = [{"max_tokens": 9}, {"max_completion_tokens": 9}]
    for cap in caps:
        choice = (cut := chat(server, "short", **cap).json)["choices"][0]
        assert (choice["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 9)
        assert "Answer" not in choice["message"]["content"]
    server.set_script({"completion_tokens": "cap"})
    full = chat(server, "short", max_tokens=77).json
    assert (full["choices"][0]["finish_reason"], full["usage"]["completion_tokens"]) == ("stop", 77)
    server.set_script({"completion_tokens": [3, 5]})
    assert {chat(server, "range").json["usage"]["completion_tokens"] for _ in range(20)} == {3, 4, 5}


def test_what_openai_refuses_is_refused_and_free(server: ApiServer) -> None:
    server.set_script({})
    before = server.billing()
    wrong = server.call("POST", CHAT, json.dumps(body()), Authorization="Bearer other")
    assert (wrong.status, wrong.json["error"]["code"]) == (401, "invalid_api_key")
    assert server.call("GET", "/v1/models", Authorization="").status == 401
    unknown = chat(server, model="gpt-17")
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")
    assert set(unknown.json["error"]) == {"message", "type", "param", "code"}
    assert server.call("POST", CHAT, "{").status == 400
    assert chat(server, stream=True).status == 400
    assert chat(server, max_tokens=0).status == 400
    assert server.call("GET", "/v1/elsewhere").status == 404
    after = server.billing()
    assert (after["refused"] - before["refused"], after["billed"]) == (7, before["billed"])
    assert [entry["status"] for entry in server.log()[-7:]] == [401, 401, 404, 400, 400, 400, 404]


def test_models_and_health(server: ApiServer) -> None:
    server.set_script({"models": ["a", "b"]})
    assert [model["id"] for model in server.call("GET", "/v1/models").json["data"]] == ["a", "b"]
    assert server.call("GET", "/health", Authorization="").status == 200


def test_a_connection_carries_many_requests(server: ApiServer) -> None:
    server.set_script({})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        for text in ("one", "two"):
            connection.request("POST", CHAT, json.dumps(body(text)), {"Authorization": "Bearer test-key"})
            local = connection.sock
            assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"].startswith(
                f"echo {text}"
            )
            assert connection.sock is local is not None
    finally:
        connection.close()


def test_nonsense_is_not_served(server: ApiServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", CHAT)
    connection.putheader("Authorization", "Bearer test-key")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()  # no body: the server closes when it has seen these
    assert connection.getresponse().status == 400
    connection.close()


# Faults


@pytest.mark.parametrize("status", sorted(REFUSALS))
def test_a_scripted_refusal_costs_nothing(server: ApiServer, status: str) -> None:
    before = one_fault(server, status, retry_after=0.25, code="because")
    answer = chat(server)
    assert (answer.status, answer.json["error"]["code"]) == (int(status), "because")
    assert answer.headers["retry-after"] == "0.25"
    assert events(server, before) == ["refused"]
    assert server.log()[-1]["status"] == int(status)


def test_retry_after_may_be_a_date_or_missing(server: ApiServer) -> None:
    one_fault(server, "429", retry_after=30, http_date=True)
    wait = parsedate_to_datetime(chat(server).headers["retry-after"]).timestamp() - time.time()
    assert 29 < wait < 31.5
    one_fault(server, "429")
    answer = chat(server)
    assert "retry-after" not in answer.headers
    assert answer.json["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("disconnect_before", ["refused"]), ("disconnect_after", ["billed"]), ("hang", ["billed"])],
)
def test_no_reply_at_all(server: ApiServer, kind: str, expected: list[str]) -> None:
    before = one_fault(server, kind, **({"seconds": 0.05} if kind == "hang" else {}))
    with pytest.raises(http.client.RemoteDisconnected):
        chat(server)
    assert events(server, before) == expected


def test_a_hang_may_be_free_and_ends_when_the_client_gives_up(server: ApiServer) -> None:
    before = one_fault(server, "hang", seconds=60, billed=False)
    with pytest.raises(TimeoutError):
        chat(server, timeout=0.05)
    assert events(server, before) == ["refused"]


def test_a_body_cut_short(server: ApiServer) -> None:
    before = one_fault(server, "truncated_body")
    with pytest.raises(http.client.IncompleteRead) as caught:
        chat(server)
    assert caught.value.partial.startswith(b'{"id"')
    assert events(server, before) == ["billed"]


def test_a_body_that_is_not_json(server: ApiServer) -> None:
    before = one_fault(server, "malformed")
    answer = chat(server)
    assert answer.status == 200
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.content)
    assert events(server, before) == ["billed"]


def test_replies_of_an_odd_shape(server: ApiServer) -> None:
    before = one_fault(server, "empty_choices")
    assert chat(server).json["choices"] == []
    assert events(server, before) == ["billed"]
    before = one_fault(server, "no_usage")
    assert "usage" not in chat(server).json
    assert events(server, before) == ["billed", "delivered"]
    before = one_fault(server, "wrong_usage")
    assert chat(server).json["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert server.log("billed")[-1]["micro_dollars"] == 5 + 8 * 2
    assert events(server, before) == ["billed", "delivered"]
    before = one_fault(server, "content_filter")
    choice = chat(server).json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", "")
    assert events(server, before) == ["billed", "delivered"]
    before = one_fault(server, "length")
    cut = chat(server, max_tokens=50).json
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 50)
    assert events(server, before) == ["billed", "delivered"]


def test_a_slow_drip_is_whole_in_the_end(server: ApiServer) -> None:
    before = one_fault(server, "slow_drip", seconds=0.2)
    started = time.monotonic()
    assert chat(server).json["choices"]
    assert time.monotonic() - started >= 0.2
    assert events(server, before) == ["billed", "delivered"]
    before = one_fault(server, "slow_drip", seconds=60)
    with pytest.raises(TimeoutError):
        chat(server, timeout=0.05)
    server.set_script({})
    assert server.log()[before]["event"] == "billed"


def test_a_duplicate_reply_is_billed_once(server: ApiServer) -> None:
    before = one_fault(server, "duplicate")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", CHAT, json.dumps(body()), {"Authorization": "Bearer test-key"})
    raw = b""
    assert connection.sock
    while piece := connection.sock.recv(65536):
        raw += piece
    connection.close()
    assert raw[: len(raw) // 2] == raw[len(raw) // 2 :]
    assert events(server, before) == ["billed", "delivered"]


def test_hostile_replies_are_billed_and_those_with_an_answer_are_delivered(server: ApiServer) -> None:
    before = one_fault(server, "hostile")
    readable = 0
    for number in range(80):
        try:
            answer = chat(server, f"hostile {number}")
            is_text = "content-encoding" not in answer.headers
            readable += is_text and bool(answer.json["choices"][0]["message"]["content"])
        except (http.client.HTTPException, RecursionError, ValueError, LookupError, TypeError):
            continue
    kinds = events(server, before)
    assert (kinds.count("billed"), kinds.count("delivered")) == (80, readable)
    assert 20 < readable < 60


def test_faults_know_how_often_and_whom(server: ApiServer) -> None:
    faults = [
        {"kind": "500", "match": "spider", "times": 2},
        {"kind": "503", "match": "spider", "times": 1},
    ]
    server.set_script({"faults": faults})
    assert chat(server, "a fly").status == 200
    assert [chat(server, "a spider").status for _ in range(4)] == [500, 500, 503, 200]


def test_shares_add_up_and_the_draws_do_not_depend_on_the_order(tmp_path: Path) -> None:
    script = {"faults": [{"kind": "500", "share": 0.3}, {"kind": "429", "share": 0.2}], "completion_tokens": [1, 99]}
    texts = [f"question {i}" for i in range(200)]

    def run(folder: str, order: list[str], seed: int) -> dict[str, list[tuple[int, int]]]:
        (tmp_path / folder).mkdir()
        seen: dict[str, list[tuple[int, int]]] = {}
        with ApiServer(tmp_path / folder, script, seed) as api:
            for text in order:
                answer = chat(api, text)
                seen.setdefault(text, []).append((answer.status, answer.json.get("usage", {}).get("total_tokens", 0)))
        return seen

    first = run("a", texts + texts[:20], 0)
    assert first == run("b", texts[:20] + texts[::-1], 0)
    assert first != run("c", texts + texts[:20], 1)
    statuses = [status for seen in first.values() for status, _ in seen]
    assert 0.2 < statuses.count(500) / len(statuses) < 0.4
    assert 0.1 < statuses.count(429) / len(statuses) < 0.3
    assert any(len(set(seen)) > 1 for seen in first.values()), "a second try has another chance"


def test_every_kind_of_fault_is_tested_here() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_api_*.py"))
    assert [kind for kind in sorted(SHAPES | WIRE | LINES | BATCHES) if f'"{kind}"' not in source] == []


# Limits, clients that go away, scripts


def test_a_bucket_that_is_empty_says_when_to_come_back(server: ApiServer) -> None:
    server.set_script({"rate_limit": {"requests_per_s": 20, "burst": 2}})
    answers = [chat(server) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    assert answers[0].headers["x-ratelimit-reset-requests"] == "50ms"
    assert server.log()[-1] | {"n": 0, "t": 0} == {
        "event": "refused",
        "n": 0,
        "status": 429,
        "fault": "rate_limit",
        "t": 0,
    }
    wait = float(answers[2].headers["retry-after"])
    assert 0 < wait <= 0.05
    time.sleep(wait)
    assert chat(server).status == 200
    server.set_script({"rate_limit": {"requests_per_s": 0.5, "burst": 1}})
    assert chat(server).headers["x-ratelimit-reset-requests"] == "2s"


def test_whoever_gives_up_pays_and_gets_nothing(server: ApiServer) -> None:
    server.set_script({"latency_s": 0.2})
    before = len(server.log())
    with pytest.raises(TimeoutError):
        chat(server, "too slow", timeout=0.05)
    assert server.billing()["in_flight"] == 1
    assert events(server, before) == ["billed"]


def test_a_killed_client_is_billed_and_not_delivered(server: ApiServer) -> None:
    """What the server is for: the books say the same whoever dies."""
    server.set_script({"latency_s": [0.3, 0.3]})
    before = len(server.log())
    client = f"""
import http.client
connection = http.client.HTTPConnection("127.0.0.1", {server.port})
connection.request("POST", "{CHAT}", {json.dumps(body("die"))!r}, {{"Authorization": "Bearer test-key"}})
connection.getresponse()
"""
    with subprocess.Popen([sys.executable, "-c", client]) as process:
        while not server.billing()["in_flight"]:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert events(server, before) == ["billed"]


def test_duplicates_are_bills_for_the_same_thing(tmp_path: Path) -> None:
    with ApiServer(tmp_path) as api:
        chat(api, "a", key="one")
        chat(api, "a", key="two")
        assert (api.billing()["duplicates"], api.billing()["duplicate_bodies"]) == (0, 1)
        chat(api, "b", key="two")
        chat(api, "c")
        assert api.billing()["duplicates"] == 1
        chat(api, "c")
        assert api.billing()["duplicates"] == 2


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ({"latency": 1}, "Script has no 'latency'"),
        ({"price": {"in": 1}}, "Price has no 'in'"),
        ({"faults": [{"kind": "sabotage"}]}, "there is no fault 'sabotage'"),
        ({"faults": [{"kind": "500", "seconds": 1}]}, "fault 500 has no 'seconds'"),
        ({"faults": [{"kind": "500", "share": 2}]}, "share of 500"),
    ],
)
def test_a_script_that_is_not_understood_is_an_error(server: ApiServer, script: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        server.set_script(script)


def test_a_server_does_not_start_with_such_a_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="did not start"), ApiServer(tmp_path, {"latency": 1}):
        pass
    assert capfd.readouterr().err == "api_server: Script has no 'latency'\n"
