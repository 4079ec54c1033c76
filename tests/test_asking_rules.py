"""The pure rules of asking: identity, worst cases, what an attempt came to, and when the next may go."""

from __future__ import annotations

import json
import re
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stepladder.ask.ledger import Grant, Ledger, Scope
from stepladder.ask.outcome import FINAL, Delivery, Outcome, judge, retry_after
from stepladder.ask.remote.gate import (
    FIRST_TRIES,
    MAX_PAUSE_SECONDS,
    PROBES,
    START_IN_FLIGHT,
    TRIES,
    Bucket,
    Gate,
    parse_duration,
    reset_wait,
)
from stepladder.ask.remote.waiting import Wait, WaitNotes, clock
from stepladder.ask.request import Request, prompt_bound, worst_case
from stepladder.config import Price
from stepladder.records import Message

PRICE = Price.model_validate({"input": 0.15, "output": 0.6})
TEXTS = st.text(max_size=40)
REQUESTS = st.builds(
    Request,
    model=TEXTS,
    messages=st.lists(
        st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXTS), max_size=3
    ).map(tuple),
    temperature=st.floats(0, 2),
    top_p=st.none() | st.floats(0, 1),
    sample_index=st.integers(0, 9),
    max_tokens=st.integers(1, 4096),
)


def request(text: str = "hi", max_tokens: int = 10) -> Request:
    return Request(model="m", messages=(Message(role="user", content=text),), max_tokens=max_tokens)


# Identity


@given(REQUESTS, REQUESTS)
def test_two_requests_share_a_key_exactly_if_they_differ_in_nothing_but_the_cap(a: Request, b: Request) -> None:
    same = a.model_dump(exclude={"max_tokens"}) == b.model_dump(exclude={"max_tokens"})
    assert (a.key == b.key) == same
    assert a.key == a.model_copy(update={"max_tokens": 1}).key


# Worst cases


@given(REQUESTS, st.integers(0, 50), st.decimals(0, 100, places=4), st.decimals(0, 100, places=4))
def test_no_usage_within_the_bounds_costs_more_than_the_worst_case(
    asked: Request, less: int, dear_in: Any, dear_out: Any
) -> None:
    price = Price(input=dear_in, output=dear_out)
    tokens = max(0, prompt_bound(asked.messages) - less)
    assert price.of(tokens, max(0, asked.max_tokens - less)) <= worst_case(asked, price)


@given(st.lists(TEXTS, max_size=3))
def test_the_bound_covers_bytes_and_what_normalising_makes_of_them(texts: list[str]) -> None:
    messages = [Message(role="user", content=text) for text in texts]
    assert prompt_bound(messages) >= sum(len(text.encode()) for text in texts)
    assert prompt_bound([Message(role="user", content="㍿")]) - prompt_bound([Message(role="user", content="")]) == 12


@given(st.text(st.sampled_from("a가㍿\ufdfa\ufdfb\u0301\u0327\u0345\u1100\u1161\u11a8\ufb2c\u0f73"), max_size=90))
def test_the_bound_covers_the_composition_of_odd_texts(text: str) -> None:
    bound = prompt_bound([Message(role="user", content=text)])
    assert bound >= prompt_bound([Message(role="user", content="")]) + len(unicodedata.normalize("NFKC", text).encode())


def test_the_bound_of_many_combining_characters_is_found_at_once() -> None:
    """NFKC takes most of a minute for this one."""
    began_seconds = time.process_time()
    assert prompt_bound([Message(role="user", content="\u0301\u0327" * 50_000)]) > 200_000
    assert time.process_time() - began_seconds < 5


def test_money_is_whole_and_rounded_up() -> None:
    assert Price.model_validate({"input": 0.15, "output": 0.6}).of(1, 0) == 1
    assert Price.model_validate({"input": 0.1, "output": 0.2}).of(10, 10) == 3  # floats would say 3.0000000000000004


# Outcomes


def reply(**changes: Any) -> Delivery:
    body = {
        "choices": [{"message": {"content": "Answer: A"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4},
        **changes,
    }
    return Delivery(200, json.dumps(body).encode())


def refusal(status: int, code: str = "", **headers: str) -> Delivery:
    return Delivery(status, json.dumps({"error": {"message": "no", "code": code}}).encode(), headers)


def choice(**changes: Any) -> list[dict[str, Any]]:
    return [{"message": {"content": "x"}, "finish_reason": "stop", **changes}]


@pytest.mark.parametrize(
    ("delivery", "kind", "charge"),
    [
        (reply(), "answered", 4),
        (reply(choices=choice(finish_reason="length")), "truncated", 4),
        (reply(choices=choice(finish_reason="content_filter", message={"content": None})), "filtered", 4),
        (reply(choices=choice(finish_reason="tool_calls")), "malformed", None),
        (reply(choices=[]), "malformed", None),
        (reply(choices=choice(message="text")), "malformed", None),
        (reply(choices=choice(message={"content": 5})), "malformed", None),
        (reply(usage=None), "answered", None),
        (reply(usage={"prompt_tokens": 0, "completion_tokens": 0}), "answered", None),
        (reply(usage={"prompt_tokens": "9", "completion_tokens": 4}), "answered", None),
        (reply(usage={"prompt_tokens": 10**9, "completion_tokens": 4}), "answered", None),
        (Delivery(200, b"\xff not json"), "malformed", None),
        (Delivery(200, b"[]"), "malformed", None),
        (refusal(400), "rejected", 0),
        (refusal(400, "content_filter"), "refused", 0),
        (refusal(413), "refused", 0),
        (refusal(401), "fatal", 0),
        (refusal(403), "fatal", 0),
        (refusal(404), "fatal", 0),
        (refusal(429), "rate_limited", 0),
        (refusal(429, "insufficient_quota"), "fatal", 0),
        (refusal(500), "transient", 0),
        (refusal(503), "transient", 0),
        (refusal(502), "lost", None),
        (refusal(504), "lost", None),
        (Delivery(500, b""), "transient", 0),
        (Delivery(error="reset"), "lost", None),
        (Delivery(error="refused", sent=False), "transient", 0),
    ],
)
def test_a_delivery_is_judged(delivery: Delivery, kind: str, charge: int | None) -> None:
    outcome = judge(request(), delivery, PRICE)
    assert (outcome.kind, outcome.charge) == (kind, charge)
    assert (outcome.response is not None) == (kind in FINAL)
    if outcome.response is not None and charge is None:
        assert outcome.response.micro_dollars == worst_case(request(), PRICE)


@pytest.mark.parametrize(
    ("delivery", "why"),
    [
        (reply(choices=choice(finish_reason="tool_calls")), "its finish_reason is 'tool_calls', where stop, length, "),
        (reply(choices=choice(finish_reason=None)), "its finish_reason is missing"),
        (reply(choices=choice(finish_reason=["stop"])), "its finish_reason is missing"),
        (reply(choices=[]), "it has no message in choices[0]"),
        (reply(choices=choice(message={"content": 5})), "the content of its message is no text"),
        (
            Delivery(200, b"<html>\x1b]52;c;\x07", {"content-type": "text/html"}),
            "it is no JSON; text/html, begins '<html>",
        ),
        (Delivery(200, b""), "it is no JSON; without a content type, an empty body"),
    ],
)
def test_a_reply_that_cannot_be_read_is_described(delivery: Delivery, why: str) -> None:
    message = judge(request(), delivery, PRICE).message
    assert message.startswith(f"HTTP 200 that cannot be read: {why}")
    assert "Error" not in message
    assert message.isprintable()


@given(st.none() | st.integers(100, 599), st.binary(max_size=60), st.dictionaries(TEXTS, TEXTS, max_size=2))
def test_judging_never_raises(status: int | None, body: bytes, headers: dict[str, str]) -> None:
    assert judge(request(), Delivery(status, body, headers), PRICE).kind


def test_reasoning_is_kept() -> None:
    outcome = judge(request(), reply(choices=choice(message={"content": "A", "reasoning_content": "hm"})), PRICE)
    assert outcome.response is not None
    assert (outcome.response.text, outcome.response.reasoning) == ("A", "hm")


def test_retry_after_is_read_in_every_form() -> None:
    assert retry_after({}, 0) is None
    assert retry_after({"retry-after": "1.5"}, 0) == 1.5
    assert retry_after({"retry-after-ms": "250"}, 0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 20.0) == 40.0
    assert retry_after({"retry-after": "soon"}, 0) is None
    assert retry_after({"retry-after": "-3"}, 0) == 0


# The gate


def test_a_gate_doubles_until_the_server_shows_strain_and_then_grows_slowly() -> None:
    gate = Gate(1000)
    now = 0.0

    def round_trip(kind: Any = "answered") -> None:
        nonlocal now
        going = 0
        while gate.wait(1, now) == 0:
            gate.enter(1, now)
            going += 1
        for _ in range(going):
            gate.leave(kind, now, now + 1, 0.0)
        now += 1

    assert gate.limit == PROBES
    round_trip()
    assert gate.limit >= START_IN_FLIGHT
    round_trip()
    assert gate.limit >= 1.5 * START_IN_FLIGHT
    round_trip()
    round_trip()
    before = gate.limit
    assert before > 4 * START_IN_FLIGHT
    round_trip("rate_limited")
    assert gate.limit == pytest.approx(before * 2 / 3)  # once for all that were sent together
    eased = gate.limit
    now += 1
    round_trip()  # of one request, which looks whether the server is well again
    assert gate.limit == eased
    round_trip()
    assert eased < gate.limit < 1.2 * eased


def test_single_failures_do_not_slow_a_gate_down_and_a_failing_server_does() -> None:
    gate = Gate(100)

    def outcomes(kinds: list[Any]) -> None:
        for kind in kinds:
            gate.enter(1, 0)
            gate.leave(kind, 0, 1)

    outcomes(["lost", *["answered"] * 9, "transient", *["answered"] * 9])
    assert gate.limit >= START_IN_FLIGHT
    outcomes(["lost"] * 8)
    assert gate.limit < START_IN_FLIGHT


def test_a_gate_stays_shut_as_long_as_the_server_asks() -> None:
    gate = Gate(10)
    gate.enter(1, 0)
    gate.leave("rate_limited", 0, 1, retry_after=5)
    assert gate.wait(1, 1) == 5
    assert gate.wait(1, 6) == 0
    gate.enter(1, 6)
    gate.leave("answered", 6, 7, reset_wait=2)
    assert gate.wait(1, 7) == 2


def test_limits_a_minute_are_kept() -> None:
    gate = Gate(1000, requests_per_minute=120, tokens_per_minute=6000)
    now, sent = 0.0, 0
    while now < 60:
        wait = gate.wait(40, now)
        if wait == 0:
            gate.enter(40, now)
            gate.leave("answered", now, now)
            sent += 1
        now += max(wait or 0, 0.001)
    assert 110 <= sent <= 120 + 120 / 12 + 1


def test_a_request_larger_than_the_burst_goes_when_the_bucket_is_full() -> None:
    bucket = Bucket(60)
    assert bucket.wait(1000, 0) == 0
    bucket.take(1000, 0)
    assert bucket.wait(1, 0) > 900


def test_durations_of_headers() -> None:
    texts = ("1s", "6m0s", "20ms", "1h2m3.5s", "12", "", "soon", "2026-11-26T05:33Z")
    assert [parse_duration(text) for text in texts] == [1, 360, 0.02, 3723.5, 12, 0, 0, 0]


@pytest.mark.parametrize(
    ("remaining", "reset", "seconds"),
    [
        ("0", "3s", 3),
        ("5", "3s", 0),
        ("0", "1000000030", 30),  # a point in time
        ("0", "1000000030500", 30.5),  # the same in milliseconds
        ("0", "999999000", MAX_PAUSE_SECONDS),
        ("0", "6h", MAX_PAUSE_SECONDS),
        ("0", "9" * 400, 0),
    ],
)
def test_a_reset_is_awaited_and_never_for_long(remaining: str, reset: str, seconds: float) -> None:
    headers = {"x-ratelimit-remaining-tokens": remaining, "x-ratelimit-reset-tokens": reset}
    assert reset_wait(headers, 1e9) == seconds


@pytest.mark.parametrize("asked", [86_400.0, float("inf")])
def test_a_gate_is_never_shut_for_long(asked: float) -> None:
    gate = Gate(10)
    gate.enter(1, 0)
    gate.leave("rate_limited", 0, 1, retry_after=asked, message="HTTP 429: no")
    assert gate.wait(1, 1) == MAX_PAUSE_SECONDS
    wait = gate.awaited("http://a/v1", 1)
    assert wait.what == "http://a/v1, which is asked nothing for now (HTTP 429: no)"
    assert wait.until == 1 + MAX_PAUSE_SECONDS


@pytest.mark.parametrize("kind", ["transient", "lost", "malformed", "rate_limited"])
@pytest.mark.parametrize(("answers", "tries"), [(0, FIRST_TRIES), (1, TRIES)])
def test_a_server_that_gives_nothing_gets_single_probes_and_is_given_up(kind: Any, answers: int, tries: int) -> None:
    gate, now, sent = Gate(100), 0.0, 0
    for _ in range(answers):
        gate.enter(1, now)
        gate.leave("answered", now, now)
    while not gate.is_exhausted:
        now += gate.wait(1, now) or 0.0
        together = 0
        while gate.wait(1, now) == 0:
            gate.enter(1, now)
            together += 1
        sent += together
        now += 1
        for _ in range(together):
            gate.leave(kind, now - 1, now)
    assert sent == (START_IN_FLIGHT if answers else PROBES) + tries - 1
    assert 10 < now < 400
    gate.enter(1, now)
    gate.leave("answered", now, now)
    assert gate.failures == 0


def test_a_success_among_failures_keeps_a_server() -> None:
    gate = Gate(100)
    for round_trip in range(40):
        gate.enter(1, round_trip)
        gate.leave("malformed" if round_trip % 3 else "answered", round_trip, round_trip + 0.5)
        assert not gate.is_exhausted


# Waits


def test_a_wait_is_told_once_it_lasts_and_not_again_and_again() -> None:
    said: list[str] = []
    notes = WaitNotes(said.append, 0.0)
    answers = Wait("3 answers of http://a/v1", 600.0, "answers")
    for now in (1.0, 4.9, 5.0, 6.0, 64.9):
        notes.look(answers, now)
    assert len(said) == 1
    assert re.fullmatch(r"waiting for 3 answers of http://a/v1, until \d\d:\d\d:\d\d at the latest", said[0])
    notes.look(answers, 65.0)
    assert len(said) == 2
    notes.look(answers._replace(key="batch", until=86_466.0), 66.0)
    notes.look(answers._replace(key="batch", until=86_466.0), 3600.0)  # once an hour, of a day
    assert len(said) == 3
    said.pop()
    notes.hear(66.0)
    notes.look(answers, 70.0)
    assert len(said) == 2
    notes.look(None, 80.0)
    notes.look(Wait("a server", None, "no server"), 80.0)
    assert said[2:] == ["waiting for a server"]


def test_a_pause_is_told_at_its_beginning_if_it_will_last() -> None:
    said: list[str] = []
    notes = WaitNotes(said.append, 0.0)
    notes.look(Wait("a moment", 5.0, "short", is_pause=True), 0.0)
    assert said == []
    for _ in range(2):
        notes.look(Wait("the limit", 30.0, "long", is_pause=True), 0.0)
    assert re.fullmatch(r"waiting for the limit, until \d\d:\d\d:\d\d", "".join(said))


def test_times_of_other_days_have_a_date() -> None:
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock(-3))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", clock(100_000))


# What a statement costs must not grow with the ledger


def test_no_statement_of_an_attempt_s_life_scans_a_table(ledger: Ledger) -> None:
    said: list[str] = []
    ledger.begin_session()
    ledger._db.set_trace_callback(said.append)
    scope = Scope("run", "rung", 10**6, 10**6)
    with ledger.transaction():
        grant = ledger.reserve(request(), PRICE, scope, "m")
        assert isinstance(grant, Grant)
        ledger.settle(grant, request(), scope, reply(), judge(request(), reply(), PRICE), 0.1)
    with ledger.transaction():
        assert ledger.reserve(request(), PRICE, scope, "m") == "stored"
    ledger._db.set_trace_callback(None)
    statements = [sql for sql in said if sql.startswith(("SELECT", "UPDATE"))]
    assert len(statements) > 5
    for sql in statements:
        plan = " ".join(row[3] for row in ledger._db.execute(f"EXPLAIN QUERY PLAN {sql}"))
        assert "SCAN" not in plan, sql


# The life of an attempt, and the sums, against a model in plain Python


class Books(RuleBasedStateMachine):
    """Reserving and settling in any order: the ledger's sum is what a list of numbers says, and never over the cap."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self.folder.name) / "ledger.sqlite")
        self.other = Ledger(Path(self.folder.name) / "ledger.sqlite")
        self.ledger.begin_session()
        self.scope = Scope("run", "rung", run_cap=3000, rung_cap=2000)
        self.open: list[tuple[Request, Grant]] = []
        self.charges: dict[int, int] = {}
        self.answered: set[str] = set()

    def teardown(self) -> None:
        self.ledger.close()
        self.other.close()
        self.folder.cleanup()

    @rule(number=st.integers(0, 30), max_tokens=st.integers(1, 900))
    def reserve(self, number: int, max_tokens: int) -> None:
        asked = request(f"q{number}", max_tokens)
        worst = worst_case(asked, PRICE)
        with self.ledger.transaction():
            grant = self.ledger.reserve(asked, PRICE, self.scope, "m")
        if asked.key in self.answered:
            assert grant == "stored"
        elif asked.key in {one.key for one, _ in self.open}:
            assert grant == "busy"
        elif sum(self.charges.values()) + worst > 2000:
            assert grant == "over_budget"
        else:
            assert isinstance(grant, Grant)
            assert grant.reserved == worst
            self.open.append((asked, grant))
            self.charges[grant.attempt] = worst

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(), charge=st.none() | st.integers(0, 200), kind=st.sampled_from(["answered", "lost", "transient"])
    )
    def settle(self, data: st.DataObject, charge: int | None, kind: Any) -> None:
        asked, grant = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        charge = None if charge is None else min(charge, grant.reserved)
        response = judge(asked, reply(), PRICE).response if kind == "answered" else None
        with self.ledger.transaction():
            outcome = Outcome(kind, charge, response)
            self.ledger.settle(grant, asked, self.scope, Delivery(200, b"raw"), outcome, 0.1)
        if charge is not None:
            self.charges[grant.attempt] = charge
        if response is not None:
            self.answered.add(asked.key)

    @rule()
    def another_process_writes(self) -> None:
        self.other.store("elsewhere", [])

    @invariant()
    def sums_agree(self) -> None:
        total = sum(self.charges.values())
        assert self.ledger.spent("run") == self.other.spent("run", "rung") == total <= 2000
        assert len(self.ledger.unsettled("run")) == len(self.open)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)  # every step waits for the disk
