"""Servers of one's own: balanced, coming and going, and turned away when they serve something else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from api_server import ApiServer
from asker import requests

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.remote import servers
from stepladder.ask.remote.admission import PROBE, Admission, WrongServer, difference
from stepladder.ask.remote.openai_http import Http
from stepladder.ask.remote.servers import Addresses, read_addresses
from stepladder.ask.request import Request, Response, TokenLogprob
from stepladder.config import Model, Price
from stepladder.errors import AskError

SCOPE = Scope("run", "easy")
OTHER = {"content": "I am somebody else.\nAnswer: B"}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[ApiServer, ApiServer]]:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with ApiServer(folders[0]) as one, ApiServer(folders[1]) as two:
        yield one, two


def own(*urls: str, file: Path | None = None, model: str = "test-model") -> Model:
    table = {"engine": "openai", "model": model, "api_key_env": "ASKER_KEY", "price": {"input": 0, "output": 0}}
    where = {"base_url": urls} if file is None else {"base_url_file": file}
    return Model.model_validate({**table, **where, "concurrency": 8, "timeout": 5})


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASKER_KEY", "test-key")


def asked(api: ApiServer) -> int:
    return int(api.settled()["billed"])


def test_servers_of_the_same_weights_share_the_work(pair: tuple[ApiServer, ApiServer], ledger: Ledger) -> None:
    for api in pair:
        api.set_script({"latency_s": 0.02})
    answers = ask_remote(requests("shared", 100), RemoteModel("own", own(*(api.url for api in pair))), ledger, SCOPE)
    assert len(answers) == 100
    assert all(asked(api) > 20 for api in pair)
    assert sum(asked(api) for api in pair) == 102  # each has shown once who it is


def test_the_terminal_s_encoding_changes_no_question(
    pair: tuple[ApiServer, ApiServer], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "gbk")
    questions = requests("谁在吵？", 3)
    answers = ask_remote(questions, RemoteModel("own", own(pair[0].url)), ledger, SCOPE)
    assert answers.keys() == {request.key for request in questions}


def test_a_server_with_other_weights_is_not_asked(pair: tuple[ApiServer, ApiServer], ledger: Ledger) -> None:
    one, two = pair
    two.set_script(OTHER)
    ask_remote(requests("first", 5), RemoteModel("own", own(one.url)), ledger, SCOPE)
    notes: list[str] = []
    answers = ask_remote(
        requests("both", 20), RemoteModel("own", own(two.url, one.url)), ledger, SCOPE, Listener(note=notes.append)
    )
    assert {answer.text.partition(" ")[0] for answer in answers.values()} == {"echo"}
    assert asked(two) == 1
    assert len(notes) == 1
    assert f"{two.url}: it has other weights than the server whose answers are in the ledger" in notes[0]
    with pytest.raises(AskError, match=r"model 'own': .*other weights.*nothing more was sent"):
        ask_remote(requests("alone", 5), RemoteModel("own", own(two.url)), ledger, SCOPE)


def test_a_server_that_serves_another_name_is_not_asked(pair: tuple[ApiServer, ApiServer], ledger: Ledger) -> None:
    with pytest.raises(AskError, match="it serves test-model and not student"):
        ask_remote(requests("named", 5), RemoteModel("own", own(pair[0].url, model="student")), ledger, SCOPE)
    assert asked(pair[0]) == 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            {"tokens": [1, 2, 4, 5]},
            r"prompt token 2 is \[4\] at the server and \[3\] by the run's tokenizer \(4 and 3 tokens in all\)",
        ),
        ({"tokens": [1, 2]}, r"prompt token 2 is \[\] at the server and \[3\] by the run's"),
        ({"prompt_tokens": 4}, "the probe has 4 prompt tokens at the server and 3 by the run's tokenizer"),
        ({"prompt_tokens": 3, "tokens": [1, 2, 3]}, None),
        ({"prompt_tokens": 3}, None),
        ({"faults": [{"kind": "400"}]}, "HTTP 400"),
    ],
)
def test_a_server_with_another_template_is_not_asked(
    pair: tuple[ApiServer, ApiServer], ledger: Ledger, script: dict[str, object], said: str | None
) -> None:
    api = pair[0]
    api.set_script(script)

    async def check() -> None:
        connection = Http(api.url, "test-model", "test-key", 5)
        async with Committer(ledger) as committer:
            try:
                await Admission("weights", "test-model", [1, 2, 3], "run").check(connection, committer)
            finally:
                await connection.close()

    if said is None:
        asyncio.run(check())
    else:
        with pytest.raises(WrongServer, match=said):
            asyncio.run(check())


def test_servers_come_and_go_while_a_run_lasts(
    pair: tuple[ApiServer, ApiServer], ledger: Ledger, tmp_path: Path
) -> None:
    one, two = pair
    for api in pair:
        api.set_script({"latency_s": 0.2})
    file = tmp_path / "servers.txt"
    file.write_text(f"# nobody yet, later {one.url}\n\n")
    notes: list[str] = []
    unwritten = [f"{two.url}/\n", "nonsense\n", f"{one.url}\n"]

    def hear(line: str) -> None:
        notes.append(line)
        if "waiting for one" in line or "'nonsense'" in line:
            file.write_text(unwritten.pop())

    def count(done: int, spent: int) -> None:
        if done > 10 and len(unwritten) == 2:
            file.write_text(unwritten.pop())

    answers = ask_remote(
        requests("moving", 200), RemoteModel("own", own(file=file)), ledger, SCOPE, Listener(count, note=hear)
    )
    assert len(answers) == 200
    assert asked(one) > 10
    assert asked(two) > 10
    waited, came, bad, moved = notes
    assert waited.endswith("no server yet; waiting for one")
    assert came.endswith(f"servers now: {one.url}")
    assert "'nonsense' is no base URL" in bad
    assert bad.endswith("the last valid list stays in use")
    assert moved.endswith(f"servers now: {two.url}")


def test_a_list_of_servers_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "servers.txt"
    with pytest.raises(AskError, match="cannot be read"):
        read_addresses(file)
    file.write_text("http://a/v1\n\n# two\nhttp://b/v1/\nhttp://a/v1\n")
    assert read_addresses(file) == ["http://a/v1", "http://b/v1"]
    file.write_text("http://a/v1\nb:8000\n")
    with pytest.raises(AskError, match=r"servers.txt:2: 'b:8000' is no base URL"):
        read_addresses(file)


def test_a_list_that_goes_bad_stays_as_it_was(tmp_path: Path) -> None:
    file, notes = tmp_path / "servers.txt", list[str]()
    file.write_text("http://a/v1\n")
    addresses = Addresses(file, notes.append)
    file.write_text("what?\n")
    assert addresses() == addresses() == ["http://a/v1"]
    file.unlink()
    assert addresses() == ["http://a/v1"]
    file.write_text("http://a/v1\nhttp://b/v1\n")
    assert addresses() == ["http://a/v1", "http://b/v1"]
    assert [("stays in use" in note) for note in notes] == [True, True, False]


def test_a_server_nobody_reaches_is_given_up(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "RETRY_WAITS_SECONDS", (0.01,) * 2)
    with pytest.raises(AskError, match=r"http://127.0.0.1:9/v1: it cannot be reached"):
        asyncio.run(_ask_here(requests("nobody", 2), "http://127.0.0.1:9/v1", ledger))


async def _ask_here(wanted: list[Request], url: str, ledger: Ledger) -> None:
    from stepladder.ask.remote.engine import ask_all
    from stepladder.ask.remote.teacher import priced_model

    admission = Admission("weights", "test-model", None, "run")
    await ask_all(wanted, priced_model(RemoteModel("own", own(url)), admission), ledger, SCOPE)


def test_a_server_that_was_away_shows_again_who_it_is(tmp_path: Path, ledger: Ledger) -> None:
    """The same address, other weights: what was answered before stays, and no request goes there."""
    folders = [tmp_path / name for name in ("before", "after")]
    for folder in folders:
        folder.mkdir()
    with ApiServer(folders[0]) as api:
        ask_remote(requests("before", 3), RemoteModel("own", own(api.url)), ledger, SCOPE)
    with ApiServer(folders[1], OTHER) as api:
        with pytest.raises(AskError, match="other weights"):
            ask_remote(requests("after", 3), RemoteModel("own", own(api.url)), ledger, SCOPE)
        assert asked(api) == 1


def answer(*places: tuple[str, float, dict[str, float]], text: str = "") -> Response:
    logprobs = tuple(TokenLogprob(*place) for place in places)
    return Response(text=text, max_tokens=32, prompt_tokens=1, completion_tokens=1, logprobs=logprobs)


def test_answers_are_compared_as_far_as_they_go_together() -> None:
    one = answer(("a", -0.1, {"a": -0.1, "b": -2.5}), ("x", -0.5, {"x": -0.5}))
    assert difference(one, one) == 0
    near = answer(("a", -0.2, {"a": -0.2, "b": -2.3}), ("x", -0.5, {"x": -0.5}))
    assert difference(one, near) == pytest.approx((0.1 + 0.2 + 0) / 3)
    apart = answer(("b", -0.1, {"b": -0.1, "a": -2.5}), ("anything", -9.0, {}))
    assert difference(one, apart) == pytest.approx(2.4)  # the second place follows other words
    unlisted = answer(("c", -0.1, {"c": -0.1, "d": -2.0}))
    assert difference(one, unlisted) == pytest.approx((1.9 + 0.5 + 2.4 + 0.5) / 4, abs=0.5)
    assert difference(answer(text="yes"), answer(text="yes")) == 0
    assert difference(answer(text="yes"), answer(text="no")) == float("inf")
    assert difference(one, answer(text="yes")) == float("inf")


def test_the_probe_is_one_conversation_for_all() -> None:
    """What is on record was answered to exactly this; a new wording needs a new key version."""
    assert Request(model="w", messages=PROBE, top_logprobs=5, max_tokens=32).key == (
        "v1:02da74bc6870fafd2648c155e18b41254a8ed958b8e35cea96ac8328cd0f1b40"
    )


def test_an_answer_that_one_server_keeps_back_is_asked_of_another(
    pair: tuple[ApiServer, ApiServer], ledger: Ledger
) -> None:
    pair[0].set_script({"faults": [{"kind": "hang", "share": 0.1, "seconds": 600, "match": "kept"}]})
    model = own(*(api.url for api in pair)).model_copy(update={"timeout": 600.0})
    wanted = requests("kept", 100)
    answers = ask_remote(wanted, RemoteModel("own", model), ledger, SCOPE)
    assert answers.keys() == {request.key for request in wanted}
    (account,) = ledger.accounts("run")
    assert account.outcomes["answered"] == 100
    assert 0 < account.outcomes["lost"] < 20
    assert not ledger.unsettled("run")


def test_a_priced_model_is_not_asked_twice(pair: tuple[ApiServer, ApiServer], ledger: Ledger) -> None:
    pair[0].set_script({"faults": [{"kind": "slow_drip", "share": 0.1, "seconds": 4, "match": "kept"}]})
    wanted = requests("kept", 100)
    dear = {"price": Price(input=Decimal(1), output=Decimal(1)), "timeout": 600.0}
    model = own(*(api.url for api in pair)).model_copy(update=dear)
    assert len(ask_remote(wanted, RemoteModel("own", model), ledger, SCOPE)) == 100
    assert ledger.accounts("run")[0].outcomes["answered"] == 100
    assert sum(asked(api) for api in pair) == 100
