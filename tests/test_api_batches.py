"""Batches of the test server: half price, whole books."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from api_batches import CHAT
from api_server import Answer, ApiServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One process for most tests; each says what it wants with set_script."""
    with ApiServer(tmp_path_factory.mktemp("api")) as api:
        yield api


def body(text: str) -> dict[str, Any]:
    return {"model": "test-model", "messages": [{"role": "user", "content": text}]}


def events(api: ApiServer, since: int) -> list[str]:
    return [entry["event"] for entry in api.log()[since:]]


def lines(count: int) -> list[dict[str, Any]]:
    texts = [f"line {i}" for i in range(count)]
    return [{"custom_id": text, "method": "POST", "url": CHAT, "body": body(text)} for text in texts]


def upload(api: ApiServer, rows: list[dict[str, Any]], purpose: str = "batch") -> Answer:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    form = (
        f'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
        '--XX\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n{content}\r\n--XX--\r\n"
    )
    return api.call("POST", "/v1/files", form, Content_Type="multipart/form-data; boundary=XX")


def create(api: ApiServer, file_id: str, **more: Any) -> Answer:
    wanted = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **more}
    return api.call("POST", "/v1/batches", json.dumps(wanted))


def look(api: ApiServer, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = api.call("GET", f"/v1/batches/{batch_id}").json
    return batch


def rows_of(api: ApiServer, file_id: str | None) -> list[dict[str, Any]]:
    content = api.call("GET", f"/v1/files/{file_id}/content").content
    return [json.loads(row) for row in content.splitlines()] if file_id else []


def through(api: ApiServer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of these lines, at its end."""
    batch: dict[str, Any] = create(api, upload(api, rows).json["id"]).json
    while batch["status"] in {"validating", "in_progress"}:
        batch = look(api, batch["id"])
    return batch


def test_a_batch_from_the_upload_to_half_the_bill(server: ApiServer) -> None:
    server.set_script({"batch_polls": 3, "prompt_tokens": 10, "completion_tokens": 4, "price": {"output": 1.3}})
    file = upload(server, lines(3)).json
    assert (file["object"], file["purpose"], file["filename"]) == ("file", "batch", "in.jsonl")
    assert server.call("GET", f"/v1/files/{file['id']}").json == file
    stored = server.call("GET", f"/v1/files/{file['id']}/content").content
    assert [json.loads(row) for row in stored.splitlines()] == lines(3)
    batch = create(server, file["id"], metadata={"run": "r1"}).json
    assert (batch["status"], batch["metadata"]) == ("validating", {"run": "r1"})
    before = len(server.log())
    states = [look(server, batch["id"]) for _ in range(3)]
    assert [state["status"] for state in states] == ["in_progress", "in_progress", "completed"]
    assert states[0]["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert states[2]["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert states[2]["error_file_id"] is None
    billed = server.log()[before:]
    assert [entry["micro_dollars"] for entry in billed] == [8, 8, 8]  # half of 10 + 4 * 1.3, rounded up
    assert [entry["custom_id"] for entry in billed] == ["line 0", "line 1", "line 2"]
    output = rows_of(server, states[2]["output_file_id"])
    assert output[1]["custom_id"] == "line 1"
    assert (output[1]["error"], output[1]["response"]["status_code"]) == (None, 200)
    assert output[1]["response"]["body"]["choices"][0]["message"]["content"] == "echo line 1 #0\nAnswer: A"
    rows_of(server, states[2]["output_file_id"])
    assert events(server, before) == ["billed"] * 3 + ["delivered"] * 3
    compact = json.dumps(lines(3)[1]["body"], separators=(",", ":"))
    assert billed[1]["body_sha256"] == sha256(compact.encode()).hexdigest()


def test_sending_a_batch_again_is_a_duplicate(tmp_path: Path) -> None:
    with ApiServer(tmp_path) as api:
        through(api, lines(2))
        assert api.billing()["duplicates"] == 0
        through(api, lines(2))
        assert api.billing()["duplicates"] == 2
        samples = [row | {"custom_id": f"{row['custom_id']} again"} for row in lines(2)]
        through(api, samples)
        assert (api.billing()["duplicates"], api.billing()["duplicate_bodies"]) == (2, 2)
        assert api.billing()["requests"] == api.billing()["billed"] == 6


def test_lines_go_wrong_each_in_its_own_way(server: ApiServer) -> None:
    faults: list[dict[str, Any]] = [
        {"kind": "line_error", "match": "line 1"},
        {"kind": "line_missing", "match": "line 2"},
        {"kind": "line_missing", "match": "line 3", "billed": False},
        {"kind": "500", "match": "line 4"},
        {"kind": "empty_choices", "match": "line 5"},
        {"kind": "disconnect_before", "match": "line 6"},
    ]
    server.set_script({"faults": faults})
    before = len(server.log())
    batch = through(server, lines(7))
    assert [row["custom_id"] for row in rows_of(server, batch["output_file_id"])] == ["line 0", "line 5", "line 6"]
    failed = rows_of(server, batch["error_file_id"])
    assert [(row["custom_id"], row["response"] and row["response"]["status_code"]) for row in failed] == [
        ("line 1", None),
        ("line 4", 500),
    ]
    assert failed[0]["error"]["code"] == "server_error"
    log = server.log()[before:]
    assert [e["custom_id"] for e in log if e["event"] == "billed"] == ["line 0", "line 2", "line 5", "line 6"]
    assert [e["status"] for e in log if e["event"] == "refused"] == [0, 0, 500]
    assert len([e for e in log if e["event"] == "delivered"]) == 2, "of lines 0 and 6"


def test_a_malformed_line_is_paid(server: ApiServer) -> None:
    server.set_script({"faults": [{"kind": "malformed", "match": "line 0"}]})
    batch = through(server, lines(2))
    with pytest.raises(json.JSONDecodeError):
        rows_of(server, batch["output_file_id"])
    assert [entry["event"] for entry in server.log()[-3:]] == ["billed", "billed", "delivered"]


def test_lines_out_of_order(server: ApiServer) -> None:
    server.set_script({"faults": [{"kind": "batch_shuffled"}]})
    names = [row["custom_id"] for row in rows_of(server, through(server, lines(20))["output_file_id"])]
    ordered = [row["custom_id"] for row in lines(20)]
    assert names != ordered
    assert sorted(names) == sorted(ordered)


def test_a_batch_that_expires_has_a_part_done_and_paid(server: ApiServer) -> None:
    server.set_script({"faults": [{"kind": "batch_expired", "done": 0.75, "times": 1}]})
    before = len(server.log())
    batch = through(server, lines(4))
    assert batch["status"] == "expired"
    assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
    assert len(rows_of(server, batch["output_file_id"])) == 3
    late = rows_of(server, batch["error_file_id"])
    assert [(row["custom_id"], row["response"], row["error"]["code"]) for row in late] == [
        ("line 3", None, "batch_expired")
    ]
    assert events(server, before) == ["billed"] * 3 + ["delivered"] * 3
    assert through(server, lines(4))["status"] == "completed"


def test_an_upload_that_fails_has_stored_the_file(server: ApiServer) -> None:
    server.set_script({"faults": [{"kind": "upload_lost", "times": 1}]})
    assert upload(server, lines(1)).status == 500
    stored = server.call("GET", "/v1/files?limit=1").json["data"][0]
    assert stored["bytes"] == len(json.dumps(lines(1)[0])) + 1
    assert int(upload(server, lines(1)).json["id"][5:]) == int(stored["id"][5:]) + 1


def test_a_batch_whose_creation_is_not_confirmed_is_in_the_list(server: ApiServer) -> None:
    server.set_script({"faults": [{"kind": "batch_lost", "times": 1}]})
    file = upload(server, lines(1)).json["id"]
    with pytest.raises(http.client.RemoteDisconnected):
        create(server, file, metadata={"run": "lost"})
    newest = server.call("GET", "/v1/batches?limit=1").json["data"][0]
    assert newest["metadata"] == {"run": "lost"}
    assert newest["status"] == "validating"


def test_batches_are_listed_page_by_page(tmp_path: Path) -> None:
    with ApiServer(tmp_path) as api:
        assert api.call("GET", "/v1/batches").json["data"] == []
        file = upload(api, lines(1)).json["id"]
        names = [create(api, file).json["id"] for _ in range(3)]
        page = api.call("GET", "/v1/batches?limit=2").json
        assert [batch["id"] for batch in page["data"]] == [names[2], names[1]]
        assert (page["has_more"], page["last_id"]) == (True, names[1])
        page = api.call("GET", f"/v1/batches?limit=2&after={page['last_id']}").json
        assert ([batch["id"] for batch in page["data"]], page["has_more"]) == ([names[0]], False)
        assert api.call("GET", "/v1/batches?limit=x").status == 400


def test_a_cancelled_batch_is_free(server: ApiServer) -> None:
    server.set_script({})
    before = len(server.log())
    name = create(server, upload(server, lines(2)).json["id"]).json["id"]
    assert look(server, name)["status"] == "in_progress"
    assert server.call("POST", f"/v1/batches/{name}/cancel").json["status"] == "cancelling"
    assert look(server, name)["status"] == "cancelled"
    assert look(server, name)["output_file_id"] is None
    assert events(server, before) == []
    assert server.call("POST", f"/v1/batches/{name}/cancel").status == 409


def test_a_batch_with_a_bad_line_fails_unpaid(server: ApiServer) -> None:
    server.set_script({})
    before = len(server.log())
    first, second, third = lines(3)
    bad = [first, first, second | {"url": "/v1/embeddings"}, third | {"body": body("x") | {"model": "x"}}]
    batch = through(server, bad)
    assert batch["status"] == "failed"
    assert [(error["line"], error["code"]) for error in batch["errors"]["data"]] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_url"),
        (4, "model_not_found"),
    ]
    assert through(server, [])["status"] == "failed"
    assert events(server, before) == []


def test_wrong_uploads_and_batches_are_refused(server: ApiServer) -> None:
    server.set_script({})
    assert upload(server, lines(1), purpose="fine-tune").status == 400
    assert server.call("POST", "/v1/files", "{}", Content_Type="application/json").status == 400
    assert create(server, "file-none").status == 400
    file = upload(server, lines(1)).json["id"]
    assert create(server, file, completion_window="1h").status == 400
    assert server.call("GET", "/v1/batches/none").status == 404
    assert server.call("GET", "/v1/files/none/content").status == 404
