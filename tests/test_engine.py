"""The engine against a real server in its own process, whose billing log says what was paid and what was delivered."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from typing import Any

import pytest
from api_server import ApiServer
from asker import PRICE, Numbered, outcomes, request, requests

from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.remote.engine import _Call, ask_all
from stepladder.ask.remote.gate import Gate
from stepladder.ask.remote.listener import NO_LISTENER
from stepladder.ask.remote.openai_http import Http
from stepladder.ask.remote.servers import Endpoint
from stepladder.ask.remote.stopping import Stop
from stepladder.ask.remote.tally import Tally
from stepladder.ask.remote.teacher import PricedModel
from stepladder.ask.request import Request, Response, worst_case
from stepladder.errors import AskError, BudgetError


def teacher(*urls: str, model: str = "test-model", key: str = "test-key", timeout: float = 5) -> PricedModel:
    endpoints = [Endpoint(url, lambda url=url: Http(url, model, key, timeout), Gate(64)) for url in urls]  # type: ignore[misc]
    return PricedModel(model, PRICE, lambda: endpoints)


def ask(wanted: list[Request], some: PricedModel, ledger: Ledger, scope: Scope) -> dict[str, Response]:
    asyncio.run(ask_all(wanted, some, ledger, scope))
    return ledger.find_all(wanted)


def bill(api: ApiServer, work: Any) -> tuple[Any, dict[str, Any]]:
    """What ``work`` returns or raises, and what the server billed for it."""
    before = api.settled()
    try:
        result = work()
    except (AskError, BudgetError) as error:
        result = error
    after = api.settled()
    return result, {key: after[key] - before[key] for key in ("requests", "billed", "micro_dollars")}


def test_every_request_is_answered_paid_once_and_never_again(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({})
    wanted = requests("plain", 40)
    answers, paid = bill(api, lambda: ask([*wanted, *wanted], teacher(api.url), ledger, Scope("run")))
    assert {answers[r.key].text for r in wanted} == {f"echo plain {n} #0\nAnswer: A" for n in range(40)}
    assert paid["billed"] == 40
    assert ledger.spent("run") == paid["micro_dollars"] == sum(a.micro_dollars for a in answers.values())
    again, paid = bill(
        api, lambda: ask([*wanted, request("plain, one more", 16)], teacher(api.url), ledger, Scope("run"))
    )
    assert paid["billed"] == 1
    assert {key: again[key] for key in answers} == answers


FREE = {"429": "rate_limited", "500": "transient", "503": "transient"}
LOST = {"disconnect_before": "lost", "disconnect_after": "lost", "truncated_body": "lost"}
UNREADABLE = {"malformed": "malformed", "empty_choices": "malformed"}


@pytest.mark.parametrize(("fault", "outcome"), [*FREE.items(), *LOST.items(), *UNREADABLE.items()])
def test_a_fault_is_survived_and_its_attempt_is_on_record(
    api: ApiServer, ledger: Ledger, fault: str, outcome: str
) -> None:
    parameters = {"retry_after": 0.05} if fault == "429" else {}
    api.set_script({"faults": [{"kind": fault, "times": 2, **parameters}]})
    wanted = requests(f"fault {fault}", 6)
    answers, paid = bill(api, lambda: ask(wanted, teacher(api.url), ledger, Scope("run")))
    assert len(answers) == 6
    assert outcomes(ledger) == {"answered": 6, outcome: 2}
    assert ledger.spent("run") >= paid["micro_dollars"]
    if outcome in {"lost", "malformed"}:  # nobody knows, so the worst case stays
        assert ledger.spent("run") >= paid["micro_dollars"] + worst_case(wanted[0], PRICE)
    else:
        assert ledger.spent("run") == paid["micro_dollars"]
    if outcome == "malformed":
        with sqlite3.connect(ledger.path) as db:
            kept = db.execute("SELECT COUNT(*) FROM attempts WHERE outcome = 'malformed' AND body IS NOT NULL")
            assert kept.fetchone() == (2,)
        db.close()


@pytest.mark.parametrize("fault", ["hang", "slow_drip"])
def test_an_answer_that_does_not_come_in_time_is_asked_for_again(api: ApiServer, ledger: Ledger, fault: str) -> None:
    api.set_script({"faults": [{"kind": fault, "times": 1, "seconds": 5}]})
    answers, paid = bill(api, lambda: ask([request(fault, 16)], teacher(api.url, timeout=1), ledger, Scope("run")))
    assert len(answers) == 1
    assert outcomes(ledger) == {"answered": 1, "lost": 1}
    assert ledger.spent("run") >= paid["micro_dollars"]


@pytest.mark.parametrize("fault", ["no_usage", "wrong_usage"])
def test_an_answer_without_a_believable_bill_is_kept_and_charged_at_the_worst(
    api: ApiServer, ledger: Ledger, fault: str
) -> None:
    api.set_script({"faults": [{"kind": fault}]})
    answers, paid = bill(api, lambda: ask([request(fault, 16)], teacher(api.url), ledger, Scope("run")))
    assert [a.text for a in answers.values()] == [f"echo {fault} #0\nAnswer: A"]
    assert paid["billed"] == 1
    assert ledger.spent("run") == worst_case(request(fault, 16), PRICE)


def test_a_truncated_answer_gets_twice_the_cap_once(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "length"}]})
    answers, paid = bill(api, lambda: ask([request("long", 10)], teacher(api.url), ledger, Scope("run")))
    assert [(a.finished, a.max_tokens) for a in answers.values()] == [(False, 20)]
    assert paid["billed"] == 2
    _, paid = bill(api, lambda: ask([request("long", 10)], teacher(api.url), ledger, Scope("run")))
    assert paid["requests"] == 0
    api.set_script({})
    answers, paid = bill(api, lambda: ask([request("long", 40)], teacher(api.url), ledger, Scope("run")))
    assert [a.finished for a in answers.values()] == [True]
    _, paid = bill(api, lambda: ask([request("long", 10)], teacher(api.url), ledger, Scope("run")))
    assert paid["requests"] == 0  # a finished answer serves any cap


def test_a_filtered_answer_is_final(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "content_filter"}]})
    wanted = requests("filtered", 2)
    answers, paid = bill(api, lambda: ask(wanted, teacher(api.url), ledger, Scope("run")))
    assert [a.finish for a in answers.values()] == ["filtered", "filtered"]
    _, paid = bill(api, lambda: ask(wanted, teacher(api.url), ledger, Scope("run")))
    assert paid["requests"] == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"key": "wrong"}, "HTTP 401"), ({"model": "no-such-model"}, "HTTP 404")],
)
def test_a_wrong_key_or_model_stops_the_run_at_once(
    api: ApiServer, ledger: Ledger, asked: dict[str, str], said: str
) -> None:
    api.set_script({})
    error, paid = bill(api, lambda: ask(requests("fatal", 1400), teacher(api.url, **asked), ledger, Scope("run")))  # type: ignore[arg-type]
    assert isinstance(error, AskError)
    assert said in str(error)
    assert paid["requests"] <= 16
    assert ledger.spent("run") == paid["micro_dollars"] == 0


def test_a_400_stops_the_run_as_a_first_answer_and_costs_one_request_later(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "400"}]})
    error, paid = bill(api, lambda: ask(requests("bad", 100), teacher(api.url), ledger, Scope("run")))
    assert isinstance(error, AskError)
    assert "HTTP 400" in str(error)
    assert paid["requests"] <= 16
    api.set_script({"faults": [{"kind": "400", "match": "good 77"}]})
    error, paid = bill(api, lambda: ask(requests("good", 100), teacher(api.url), ledger, Scope("run")))
    assert "1 requests got no answer" in str(error)
    assert paid["billed"] == 99


def test_a_server_that_is_not_there_is_named(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepladder.ask.remote.gate.PAUSES_SECONDS", (0.01,))
    with pytest.raises(
        AskError, match=r"http://127.0.0.1:9/v1: cannot be reached .*, 6 times in a row.*run again to go on"
    ):
        ask(requests("nobody", 3), teacher("http://127.0.0.1:9/v1"), ledger, Scope("run"))
    assert ledger.spent("run") == 0


def test_of_two_servers_the_one_that_is_there_gets_the_work(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({})
    answers = ask(requests("half there", 60), teacher("http://127.0.0.1:9/v1", api.url), ledger, Scope("run"))
    assert len(answers) == 60


def test_the_cap_holds_and_raising_it_goes_on(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"completion_tokens": [1, 16], "latency_s": 0.01})
    wanted = requests("dear", 300)
    worst = worst_case(wanted[0], PRICE)
    cap = 5 * worst
    error, paid = bill(api, lambda: ask(wanted, teacher(api.url), ledger, Scope("run", run_cap=cap)))
    assert isinstance(error, BudgetError)
    assert "run again" in str(error)
    assert cap - 2 * worst <= ledger.spent("run") <= cap
    assert paid["micro_dollars"] == ledger.spent("run")
    error, paid = bill(api, lambda: ask(wanted, teacher(api.url), ledger, Scope("run", run_cap=cap)))
    assert isinstance(error, BudgetError)
    assert paid["requests"] <= 2
    answers, paid = bill(api, lambda: ask(wanted, teacher(api.url), ledger, Scope("run", run_cap=1000 * worst)))
    assert len(answers) == 300
    assert paid["billed"] < 300


def test_a_rung_has_a_cap_of_its_own(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({})
    worst = worst_case(request("rung 0", 16), PRICE)
    error, _ = bill(
        api, lambda: ask(requests("rung", 50), teacher(api.url), ledger, Scope("run", "hard", None, 3 * worst))
    )
    assert isinstance(error, BudgetError)
    assert "rung hard" in str(error)
    assert ledger.spent("run", "hard") <= 3 * worst
    assert len(ask(requests("other rung", 50), teacher(api.url), ledger, Scope("run", "easy", None, None))) == 50


def test_an_endless_stream_of_requests_is_asked_without_holding_it(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({})

    def stream() -> Iterable[Request]:
        for number in range(1200):
            yield request(f"stream {number % 600}", 16)

    tally = asyncio.run(ask_all(stream(), teacher(api.url), ledger, Scope("run")))
    assert isinstance(tally, Tally)
    assert tally.answered == 600
    assert tally.failed == []


def test_a_sequence_is_gone_on_with_where_its_answers_end_and_its_gaps_come_last(
    api: ApiServer, ledger: Ledger
) -> None:
    api.set_script({})
    wanted = Numbered(4000, words=3, max_tokens=16)
    some, scope = teacher(api.url), Scope("run")
    asyncio.run(ask_all([wanted[n] for n in range(3000) if n not in (70, 1400)], some, ledger, scope))
    read = list[int]()

    class Watched(Numbered):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    tally = asyncio.run(ask_all(Watched(4000, words=3, max_tokens=16), some, ledger, scope))
    assert tally.answered == 1002
    assert read[-4000:] == [*range(3000, 4000), *range(3000)]
    assert len(read) <= 4000 + 12  # as often can 4,000 be halved


def test_no_key_reaches_the_ledger(api: ApiServer, ledger: Ledger) -> None:
    api.set_script({"faults": [{"kind": "500", "times": 1}]})
    ask(requests("secret", 3), teacher(api.url), ledger, Scope("run"))
    ledger.close()
    files = [path.read_bytes() for path in ledger.path.parent.iterdir() if path.is_file()]
    assert files
    assert not any(b"test-key" in content or b"Authorization" in content for content in files)


def test_an_interrupt_is_heard_while_an_answer_arrives(ledger: Ledger) -> None:
    """asyncio.wait_for of Python 3.11 loses the cancellation of a task whose wait ends at the same moment."""

    async def interrupted() -> None:
        async with Committer(ledger) as committer:
            nobody = PricedModel("t", PRICE, lambda: [])
            asking = _Call(iter(requests("waits", 1)), nobody, committer, Scope("run"), NO_LISTENER, Stop())
            task = asyncio.create_task(asking.run())
            await asyncio.sleep(0.2)
            asking.changed.set()
            task.cancel()
            await asyncio.wait([task], timeout=3)
            assert task.cancelled()

    asyncio.run(interrupted())
