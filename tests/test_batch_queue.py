"""A provider's batch queue that holds fewer tokens than the rung has: against the test server, which refuses as OpenAI
does, and counts what is in its queue."""

from __future__ import annotations

import pytest
from api_server import ApiServer
from asker import outcomes, request, requests, rows, start

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.outcome import Unreachable
from stepladder.ask.remote import batch, batch_calls
from stepladder.ask.remote.batch_api import BatchApi, BatchRecord, QueueFull
from stepladder.ask.remote.batch_queue import QueueRefusal, read_refusal
from stepladder.ask.remote.engine import MAX_ATTEMPTS
from stepladder.config import Model
from stepladder.errors import AskError

SCOPE = Scope("run", "hard")
REFUSED = "did not fit into the queue"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_calls, "PAUSES_SECONDS", (0.01,) * 7)
    monkeypatch.setattr(batch_calls, "LISTING_WAIT_SECONDS", 0.05)


def ended(ledger: Ledger) -> list[str]:
    return [how for (how,) in rows(ledger, "SELECT ended FROM batches ORDER BY id")]


@pytest.mark.parametrize("in_the_configuration", [True, False], ids=["known", "learned"])
def test_what_does_not_fit_is_sent_as_batches_end(
    api: ApiServer, ledger: Ledger, model: Model, *, in_the_configuration: bool
) -> None:
    """60 prompts of 7 tokens, 420 in all; their bounds are 40 times as many."""
    api.set_script({"batch_queue_tokens": 100})
    before, notes = api.settled(), list[str]()
    asked = model.model_copy(update={"batch_queue_tokens": 100 if in_the_configuration else None})
    wanted = requests("queue up", 60)
    found = ask_remote(wanted, RemoteModel("t", asked, batch=True), ledger, SCOPE, Listener(note=notes.append))
    assert len(found) == 60
    after = api.settled()
    assert after["billed"] - before["billed"] == 60
    assert after["duplicates"] == before["duplicates"]
    assert after["micro_dollars"] - before["micro_dollars"] == ledger.spent("run")
    refusals = ended(ledger).count(REFUSED)
    said = "model 't': the provider's batch queue takes 100 tokens at once; requests are sent as it empties"
    if in_the_configuration:
        assert (refusals, notes) == (0, [])
    else:
        assert refusals == 1
        assert notes == [said]
    assert ended(ledger).count("completed") <= 12  # the first has one request, and teaches how many tokens it has


def test_a_queue_that_others_fill_is_waited_for_and_no_request_is_given_up(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.set_script({"batch_queue_tokens": 1})
    tries = []
    create = BatchApi.create

    def until_there_is_room(self: BatchApi, file: str, intent: str) -> str:
        tries.append(file)
        if len(tries) > 2 * MAX_ATTEMPTS:
            api.set_script({"batch_queue_tokens": 1_000})
        return create(self, file, intent)

    monkeypatch.setattr(BatchApi, "create", until_there_is_room)
    wanted = requests("patient", 20)
    assert len(ask_remote(wanted, RemoteModel("t", model, batch=True), ledger, SCOPE)) == 20
    assert ended(ledger).count(REFUSED) == 2 * MAX_ATTEMPTS
    assert outcomes(ledger)["answered"] == 20
    # A try costs a few rows of the ledger, however many requests wait.
    assert outcomes(ledger)["transient"] < 5 * MAX_ATTEMPTS + 20


def test_a_queue_without_room_for_a_day_is_an_error(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "WINDOW_SECONDS", 0.1)
    api.set_script({"batch_queue_tokens": 1})
    with pytest.raises(AskError, match=r"had no room for a day, although .*; nothing is lost, run again later"):
        ask_remote(requests("full", 5), RemoteModel("t", model, batch=True), ledger, SCOPE)
    assert ledger.spent("run") == 0
    assert ledger.unfinished_batches("run") == []


def test_a_refusal_in_reply_to_a_new_batch_counts_as_well(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, sent = BatchApi.create, list[int]()

    def full_at_first(self: BatchApi, file: str, intent: str) -> str:
        sent.append(len(rows(ledger, "SELECT 1 FROM attempts WHERE outcome IS NULL")))
        if len(sent) == 1:
            raise QueueFull(QueueRefusal("Enqueued token limit reached. Limit: 2,000 enqueued tokens.", 2_000))
        return create(self, file, intent)

    monkeypatch.setattr(BatchApi, "create", full_at_first)
    assert len(ask_remote(requests("reply", 20), RemoteModel("t", model, batch=True), ledger, SCOPE)) == 20
    assert sent[0] == 20
    assert 1 <= sent[1] < 20
    assert outcomes(ledger) == {"answered": 20, "transient": 20}


def test_a_batch_that_fills_the_queue_itself_is_not_made_again(
    api: ApiServer, ledger: Ledger, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to its making was lost, and it was not in the list at first: the first try refuses the second."""
    before, create, list_batches = api.settled(), BatchApi.create, BatchApi.list_batches
    tries, looks = list[str](), list[int]()

    def lost_then_full(self: BatchApi, file: str, intent: str) -> str:
        tries.append(file)
        if len(tries) > 1:
            raise QueueFull(QueueRefusal("Enqueued token limit reached", None))
        create(self, file, intent)
        raise Unreachable("reset")

    def late(self: BatchApi) -> list[BatchRecord]:
        looks.append(1)
        return [] if len(looks) <= 2 else list(list_batches(self))

    monkeypatch.setattr(BatchApi, "create", lost_then_full)
    monkeypatch.setattr(BatchApi, "list_batches", late)
    assert len(ask_remote(requests("itself", 6), RemoteModel("t", model, batch=True), ledger, SCOPE)) == 6
    assert api.settled()["billed"] - before["billed"] == 6
    assert ended(ledger) == ["completed"]


def test_killed_in_between_nothing_is_lost_and_nothing_is_bought_twice(
    api: ApiServer, ledger: Ledger, model: Model
) -> None:
    """``benchmarks/asking.py queue`` kills five times, at the contest's size."""
    api.set_script({"batch_queue_tokens": 200, "batch_polls": 3})
    before = api.settled()
    process = start(api.url, ledger.path, "--count", 40, "--batch")
    while api.billing()["billed"] - before["billed"] < 10:
        assert process.poll() is None
    process.kill()
    process.communicate()
    wanted = [request(f"question {number}") for number in range(40)]
    assert len(ask_remote(wanted, RemoteModel("test-model", model, batch=True), ledger, SCOPE)) == 40
    after = api.settled()
    assert after["billed"] - before["billed"] == 40
    assert after["duplicates"] == before["duplicates"]
    assert after["micro_dollars"] - before["micro_dollars"] == ledger.spent("run")
    assert outcomes(ledger)["answered"] == 40


@pytest.mark.parametrize(
    ("code", "message", "limit_tokens"),
    [
        (
            "token_limit_exceeded",
            "Enqueued token limit reached for gpt-4o in organization org-1. Limit: 90,000 enqueued tokens. Please try "
            "again once some in_progress batches have been completed.",
            90_000,
        ),
        (
            "token_limit_exceeded",
            "The number of enqueued tokens has surpassed the configured limit of 30K for the deployment 'gpt-4.1'.",
            30_000,
        ),
        (
            None,
            "Enqueued request limit reached for m in organization org-1. Limit: 1,000,000 enqueued requests.",
            None,
        ),
        ("token_limit_exceeded", None, None),
        ("token_limit_exceeded", "Limit: 0 enqueued tokens", None),
        ("token_limit_exceeded", "Limit: " + "9" * 40 + " enqueued tokens", None),
    ],
    ids=["OpenAI", "Azure", "requests", "no message", "nothing", "absurd"],
)
def test_a_full_queue_is_known_by_code_or_message(code: object, message: object, limit_tokens: int | None) -> None:
    refusal = read_refusal(code, message)
    assert refusal is not None
    assert refusal.limit_tokens == limit_tokens


def test_other_errors_are_none_of_the_queue() -> None:
    assert read_refusal("model_not_found", "The model `x` does not exist.") is None
    assert read_refusal(None, None) is None
