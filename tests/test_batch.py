"""Rungs at half price, against the test server's batch API, whose books say what was paid and what was delivered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer
from asker import outcomes, requests, rows

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.ledger.packing import unpacked
from stepladder.ask.remote import batch_calls
from stepladder.ask.remote.batch_api import BatchApi
from stepladder.ask.remote.batch_lines import read_line
from stepladder.ask.request import worst_case
from stepladder.config import Model
from stepladder.errors import AskError, BudgetError

SCOPE = Scope("run", "medium")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a batch as long as one waits for a provider."""
    monkeypatch.setattr(batch_calls, "PAUSES_SECONDS", (0.01,) * 7)
    monkeypatch.setattr(batch_calls, "LISTING_WAIT_SECONDS", 0.05)


def faults(*some: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"faults": list(some), **more}


def paid(api: ApiServer, since: dict[str, Any]) -> dict[str, int]:
    after = api.settled()
    return {key: after[key] - since[key] for key in ("billed", "micro_dollars", "duplicates")}


def test_a_batch_answers_every_request_at_half_price_and_never_again(
    api: ApiServer, ledger: Ledger, model: Model
) -> None:
    api.set_script(faults({"kind": "batch_shuffled"}))
    wanted, before, told = requests("plain", 30), api.settled(), []
    answers = ask_remote(
        [*wanted, *wanted],
        RemoteModel("t", model, batch=True),
        ledger,
        SCOPE,
        Listener(lambda done, spent: told.append(done)),
    )
    assert {answers[r.key].text for r in wanted} == {f"echo plain {n} #0\nAnswer: A" for n in range(30)}
    bought = paid(api, before)
    assert bought["billed"] == 30
    assert bought["micro_dollars"] == ledger.spent("run")  # and the server halves its prices in a batch
    assert rows(ledger, "SELECT ended, stray FROM batches") == [("completed", None)]
    ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    ask_remote(wanted, RemoteModel("t", model), ledger, SCOPE)  # the price of an answer is no part of its identity
    assert paid(api, before)["billed"] == 30
    assert told == sorted(told)


def test_lines_that_fail_expire_or_go_missing_are_asked_again(api: ApiServer, ledger: Ledger, model: Model) -> None:
    api.set_script(
        faults(
            {"kind": "batch_expired", "times": 1, "done": 0.5},
            {"kind": "line_error", "share": 0.05},
            {"kind": "line_missing", "share": 0.05},
            {"kind": "500", "share": 0.05},
            {"kind": "429", "share": 0.05},
            {"kind": "malformed", "share": 0.05},
        )
    )
    wanted, before = requests("odd", 80), api.settled()
    answers = ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert set(answers) == {r.key for r in wanted}
    bought = paid(api, before)
    assert bought["micro_dollars"] <= ledger.spent("run")
    ended = [how for (how,) in rows(ledger, "SELECT ended FROM batches ORDER BY id")]
    assert ended[0] == "expired"
    assert set(ended[1:]) == {"completed"}
    found = outcomes(ledger)
    assert found["answered"] == 80
    assert found["transient"] >= 40  # those that expired cost nothing
    assert {"lost", "malformed", "rate_limited"} <= set(found)
    # Bytes that could not be read are kept.
    kept = rows(ledger, "SELECT body FROM attempts WHERE outcome = 'malformed'")
    assert all(b"custom_id" in unpacked(body) for (body,) in kept)


@pytest.mark.parametrize("fault", ["batch_lost", "upload_lost"])
def test_a_batch_made_but_not_confirmed_is_found_and_not_made_twice(
    api: ApiServer, ledger: Ledger, model: Model, fault: str
) -> None:
    api.set_script(faults({"kind": fault, "times": 1}))
    wanted, before = requests(fault, 10), api.settled()
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)) == 10
    assert paid(api, before) == {"billed": 10, "micro_dollars": ledger.spent("run"), "duplicates": 0}
    assert len(rows(ledger, "SELECT 1 FROM batches")) == 1


def test_a_cut_off_answer_gets_twice_its_cap_once(api: ApiServer, ledger: Ledger, model: Model) -> None:
    api.set_script(faults({"kind": "length"}))
    wanted = requests("long", 3)
    answers = ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert not any(answer.finished for answer in answers.values())
    assert rows(ledger, "SELECT max_tokens, COUNT(*) FROM attempts GROUP BY 1") == [(16, 3), (32, 3)]
    before = api.settled()
    ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert paid(api, before)["billed"] == 0


def test_the_cap_holds_and_a_higher_one_goes_on(api: ApiServer, ledger: Ledger, model: Model) -> None:
    wanted, before = requests("dear", 20), api.settled()
    assert model.price is not None
    cap = 5 * worst_case(wanted[0], model.price.in_batch())
    # What settled batches leave over buys further ones, as far as the cap goes.
    with pytest.raises(BudgetError, match=r"the cap is reached \(.* for the run\).*raise the cap and run again"):
        ask_remote(wanted, RemoteModel("t", model.model_copy(), batch=True), ledger, SCOPE._replace(run_cap=cap // 4))
    api.set_script({"completion_tokens": "cap"})
    with pytest.raises(BudgetError, match="are answered and kept"):
        ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE._replace(run_cap=cap // 2))
    some = paid(api, before)
    assert 0 < some["micro_dollars"] <= ledger.spent("run") <= cap // 2
    ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE._replace(run_cap=100 * cap))
    assert paid(api, before)["billed"] == 20


def test_a_bad_key_or_a_bad_line_stops_and_costs_nothing(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, before = requests("bad", 4), api.settled()
    with pytest.raises(AskError, match="the provider refused the batch: The model `other` does not exist"):
        ask_remote(wanted, RemoteModel("t", model.model_copy(update={"model": "other"}), batch=True), ledger, SCOPE)
    monkeypatch.setenv("ASKER_KEY", "wrong")
    with pytest.raises(AskError, match="HTTP 401"):
        ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    monkeypatch.setenv("ASKER_KEY", "test-key")
    assert ledger.spent("run") == 0
    api.set_script(faults({"kind": "400", "match": "bad 2"}))
    with pytest.raises(AskError, match="1 requests got no answer"):
        ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert outcomes(ledger)["answered"] == 3
    assert paid(api, before)["billed"] == 3


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import asker
from pathlib import Path
from stepladder.ask import RemoteModel, ask_remote
from stepladder.ask.remote import batch, batch_api, batch_calls
from stepladder.ask.ledger import Ledger, Scope

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_after(method):
    def both(*arguments):
        method(*arguments)
        die()
    return both

batch_calls.PAUSES_SECONDS = (0.01,) * 7
where, when = {moment!r}.split()
old = getattr(batch_api.BatchApi, where) if when != "named" else batch._BatchClient._record_remote
if when == "before":
    setattr(batch_api.BatchApi, where, die)
elif when == "after":
    setattr(batch_api.BatchApi, where, dies_after(old))
else:
    batch._BatchClient._record_remote = dies_after(old)
wanted = asker.requests("killed", 12)
model = asker.model({url!r}, 8).model_copy(update={{"model": "test-model"}})
with Ledger(Path({ledger!r})) as ledger:
    ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, Scope("run", "medium"))
"""


@pytest.mark.parametrize(
    "moment", ["upload before", "upload after", "create before", "create after", "create named", "content before"]
)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "singly"])
def test_whenever_it_is_killed_a_batch_is_found_again_and_paid_once(
    api: ApiServer, ledger: Ledger, model: Model, moment: str, *, batched: bool
) -> None:
    """Also when the next run would rather ask one by one."""
    before = api.settled()
    code = KILLED.format(tests=str(Path(__file__).parent), moment=moment, url=api.url, ledger=str(ledger.path))
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    waiting = ledger.unfinished_batches("run")
    assert [row.requests for row in waiting] == [12]
    assert ledger.unsettled("run") == []
    wanted = requests("killed", 12)
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=batched), ledger, SCOPE)) == 12
    bought = paid(api, before)
    assert bought["billed"] == 12
    assert bought["micro_dollars"] == ledger.spent("run")
    assert ledger.unfinished_batches("run") == []


def test_a_batch_the_provider_has_lost_stays_charged(api: ApiServer, ledger: Ledger, model: Model) -> None:
    wanted = requests("gone", 3)
    assert model.price is not None
    with ledger.transaction():
        ledger.begin_session()
        lost = ledger.open_batch(SCOPE, api.url, "test-model ASKER_KEY", model.price.in_batch())
        for request in wanted:
            ledger.reserve(request, model.price.in_batch(), SCOPE, "t", api.url, lost)
        ledger.name_batch(lost, "batch_nobody_knows")
    charged = ledger.spent("run")
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)) == 3
    assert outcomes(ledger) == {"lost": 3, "answered": 3}
    assert ledger.spent("run") > charged


@pytest.mark.parametrize(
    ("line", "number", "status"),
    [
        ({"custom_id": "7", "response": {"status_code": 200, "body": {}}}, 7, 200),
        ({"custom_id": "7", "response": {"status_code": 429, "body": {}}}, 7, 429),
        ({"custom_id": "7", "response": None, "error": {"code": "batch_expired", "message": "late"}}, 7, None),
        ({"custom_id": "7", "response": None, "error": {"code": "server_error"}}, 7, 500),
        ({"custom_id": "7", "response": None, "error": None}, 7, 500),
        ({"custom_id": "seven", "response": None}, None, 200),
        ([], None, 200),
    ],
)
def test_a_line_is_read_or_kept(line: Any, number: int | None, status: int | None) -> None:
    found, delivery = read_line(json.dumps(line).encode())
    assert (found, delivery.status) == (number, status)


def test_a_line_of_nobody_is_kept_with_its_batch(ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    content = BatchApi.content
    monkeypatch.setattr(BatchApi, "content", lambda self, file, limit: content(self, file, limit) + b"from nowhere\n")
    ask_remote(requests("stray", 2), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert rows(ledger, "SELECT stray FROM batches") == [(b"from nowhere\n",)]


def test_a_batch_is_collected_at_its_own_price_and_by_its_own_account(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, before = requests("priced", 4), api.settled()
    assert model.price is not None
    with monkeypatch.context() as patch:
        patch.setattr(BatchApi, "retrieve", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)
    dear = model.model_copy(update={"price": model.price.model_copy(update={"input": model.price.input * 100})})
    ledger.close()
    with Ledger(ledger.path) as again:
        assert again.adopt_batches(api.url, "test-model OTHER_KEY") == []
        notes: list[str] = []
        assert (
            len(ask_remote(wanted, RemoteModel("t", dear, batch=True), again, SCOPE, Listener(note=notes.append))) == 4
        )
        assert paid(api, before) == {"billed": 4, "micro_dollars": again.spent("run"), "duplicates": 0}
        assert notes == ["model 't': a batch of an earlier run is collected first"]
