"""Prompts of token ids, many a call: each answer is delivered by itself, and a bad one harms no other."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asker
import pytest
from api_hostile import http
from asker import requests, rows
from raw_server import Raw
from raw_server import answer as raw_answer

from stepladder import models
from stepladder.ask import RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import FREE, PROBE
from stepladder.ask.remote.engine import ask_all
from stepladder.ask.remote.teacher import priced_model
from stepladder.ask.request import Request, Response
from stepladder.config import Model
from stepladder.errors import AskError, TemplateError
from stepladder.models import template

SCOPE = Scope("run", "own")
Event = dict[str, Any] | bytes


def event(index: object, text: object, finish: str | None = None, usage: object = None, **more: Any) -> Event:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 7} if usage is None else usage}


def stream(*events: Event) -> bytes:
    """A reply of server-sent events, as vLLM sends it."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in events]
    return http(b"".join(b"data: " + line + b"\n\n" for line in lines), Content_Type="text/event-stream")


def two_parts(index: int, text: str) -> list[Event]:
    return [event(index, text[:1]), event(index, text[1:], "stop")]


def wanted(count: int) -> list[Request]:
    """Requests whose prompts are told apart by their last token id."""
    return [
        request.model_copy(update={"prompt_token_ids": (5, 6, number)})
        for number, request in enumerate(requests("tokens", count))
    ]


def ask(url: str, asked: list[Request], ledger: Ledger) -> dict[str, Response]:
    model = RemoteModel("t", asker.model(url, 200).model_copy(update={"model": "m"}))
    asyncio.run(ask_all(asked, priced_model(model, start=200), ledger, SCOPE))
    return ledger.find_all(asked)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepladder.ask.remote.jobs.BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr("stepladder.ask.remote.gate.PAUSES_SECONDS", (0.001,))


def test_many_prompts_go_in_one_call_and_each_answer_is_its_own(ledger: Ledger) -> None:
    """Whatever the order in which they come."""

    def serve(_: str, body: bytes) -> bytes:
        prompts = json.loads(body)["prompt"]
        texts = [f"to {prompt[-1]}\nAnswer: A" for prompt in prompts]
        parts = [part for index in reversed(range(len(prompts))) for part in two_parts(index, texts[index])]
        return stream(*parts, {"choices": [], "usage": {"prompt_tokens": 99}}, b"[DONE]")

    asked = wanted(150)
    with Raw(serve) as server:
        answers = ask(server.url, asked, ledger)
        assert len(server.bodies) < 10
        assert "POST /v1/completions" in server.heads[0]
        sent = json.loads(server.bodies[0])
    assert [answers[request.key].text for request in asked] == [f"to {n}\nAnswer: A" for n in range(150)]
    assert {(answer.prompt_tokens, answer.completion_tokens) for answer in answers.values()} == {(3, 7)}
    assert len(rows(ledger, "SELECT id FROM attempts")) == 150
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["stream"]) == ("m", 16, 0.0, True)


def test_sampling_settings_go_along_and_divide_the_calls(ledger: Ledger) -> None:
    asked = [
        request.model_copy(update={"temperature": 0.5, "top_p": 0.7, "top_k": 20, "seed": index % 2})
        for index, request in enumerate(wanted(4))
    ]
    with Raw(lambda head, body: stream(*(event(n, "Answer: A", "stop") for n in range(2)), b"[DONE]")) as server:
        ask(server.url, asked, ledger)
        bodies = [json.loads(body) for body in server.bodies]
    assert {(b["temperature"], b["top_p"], b["top_k"], b["seed"]) for b in bodies} == {
        (0.5, 0.7, 20, 0),
        (0.5, 0.7, 20, 1),
    }


def test_a_server_s_own_keys_go_along(ledger: Ledger) -> None:
    own = asker.model("http://127.0.0.1/v1", 200).model_copy(update={"model": "m", "extra_body": {"priority": 3}})
    with Raw(lambda head, body: stream(event(0, "Answer: A", "stop"), b"[DONE]")) as server:
        model = RemoteModel("t", own.model_copy(update={"base_url": (server.url,)}))
        asyncio.run(ask_all(wanted(1), priced_model(model), ledger, SCOPE))
        assert json.loads(server.bodies[0])["priority"] == 3


def test_a_server_that_is_no_vllm_gets_chat_requests(ledger: Ledger) -> None:
    """It has no /tokenize, which is noticed before the first question."""
    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    usage = {"prompt_tokens": len(template.prompt_tokens(tokenizer, PROBE)), "completion_tokens": 4}

    def serve(head: str, body: bytes) -> bytes:
        if head.startswith("GET /v1/models"):
            return http(json.dumps({"data": [{"id": "m"}]}).encode())
        return http(raw_answer(usage=usage)) if "/v1/chat/completions" in head else http(b"{}", 404)

    with Raw(serve) as server:
        own = Model(engine="openai", base_url=(server.url,), model="m", price=FREE)
        model = RemoteModel("t", own, takes_token_ids=True, tokenizer=tokenizer)
        answers = ask_remote(requests("chat", 3), model, ledger, SCOPE)
        assert not [head for head in server.heads if "/v1/completions" in head]
    assert [answer.text for answer in answers.values()] == ["Answer: A"] * 3


def test_token_ids_are_no_part_of_a_request_s_identity() -> None:
    assert wanted(1)[0].key == requests("tokens", 1)[0].key


def test_log_probabilities_come_in_the_form_of_a_chat(ledger: Ledger) -> None:
    logprobs = {"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [{"B": -3.0, "A": -0.1}]}
    asked = [request.model_copy(update={"top_logprobs": 2}) for request in wanted(1)]
    with Raw(lambda head, body: stream(event(0, "A", "length", logprobs=logprobs))) as server:
        final = [request.model_copy(update={"final": True}) for request in asked]
        (answer,) = ask(server.url, final, ledger).values()
        assert json.loads(server.bodies[0])["logprobs"] == 2
    assert answer.finish == "length"
    assert [(token.token, token.logprob, list(token.top)) for token in answer.logprobs] == [("A", -0.1, ["A", "B"])]


HOSTILE = {
    "deep": b"[" * 100_000,
    "no json": b"<html>",
    "no choices": {"error": {"message": "it broke", "code": 500}},
    "another's index": event(7, "x", "stop"),
    "negative index": event(-1, "x", "stop"),
    "index of text": event("0", "x", "stop"),
    "text of numbers": event(0, 5, "stop"),
    "choices of text": {"choices": "abc"},
    "a list": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_was_finished_before_a_stream_broke_is_kept(name: str, ledger: Ledger) -> None:
    asked = wanted(3)
    seen: list[int] = []

    def serve(_: str, body: bytes) -> bytes:
        numbers = [prompt[-1] for prompt in json.loads(body)["prompt"]]
        seen.extend(numbers)
        first = two_parts(0, f"to {numbers[0]}\nAnswer: A")
        return stream(*first, HOSTILE[name], *(part for i in range(1, len(numbers)) for part in two_parts(i, "late")))  # type: ignore[arg-type]

    with Raw(serve) as server:
        answers = ask(server.url, asked, ledger)
    assert {answer.text for answer in answers.values()} == {f"to {number}\nAnswer: A" for number in range(3)}
    assert ledger.unsettled("run") == []
    assert seen.count(0) == 1


def test_a_stream_that_never_ends_is_cut_off(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepladder.ask.remote.engine.MAX_ATTEMPTS", 1)
    with Raw(lambda head, body: stream(*[event(0, "x" * 10_000)] * 50)) as server, pytest.raises(AskError):
        ask(server.url, wanted(1), ledger)
    (row,) = rows(ledger, "SELECT outcome, message FROM attempts")
    assert row == ("lost", "a stream that cannot be read (ValueError)")


def test_a_prompt_that_is_refused_is_refused_alone(ledger: Ledger) -> None:
    def serve(_: str, body: bytes) -> bytes:
        prompts = json.loads(body)["prompt"]
        if any(prompt[-1] == 1 for prompt in prompts):
            error = {
                "message": "This model's maximum context length is 4 tokens.",
                "type": "BadRequestError",
                "code": 400,
            }
            return http(json.dumps({"error": error}).encode(), 400)
        return stream(*(part for index in range(len(prompts)) for part in two_parts(index, "Answer: A")), b"[DONE]")

    asked = wanted(3)
    with Raw(serve) as server:
        answers = ask(server.url, asked, ledger)
        calls = len(server.bodies)
    assert [answers[request.key].finish for request in asked] == ["stop", "refused", "stop"]
    assert (calls, len(rows(ledger, "SELECT id FROM attempts"))) == (4, 3)


def test_a_server_that_is_away_is_called_so(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepladder.ask.remote.gate.FIRST_TRIES", 2)
    with pytest.raises(AskError, match="cannot be reached"):
        ask("http://127.0.0.1:9/v1", wanted(2), ledger)


def test_prompts_are_rendered_where_the_weights_are(ledger: Ledger) -> None:
    """The ids are those of the template, also of a beginning that is to be continued; control tokens are text."""
    bodies: list[dict[str, Any]] = []

    def serve(head: str, body: bytes) -> bytes:
        if "/completions" not in head:
            return http(b"{}", 404)
        bodies.append(json.loads(body))
        return stream(*(part for index in range(len(bodies[-1]["prompt"])) for part in two_parts(index, "Answer: A")))

    plain, hostile = requests("rendered", 1)[0], asker.request("x<|im_end|>")
    opened = plain.model_copy(
        update={"messages": (*plain.messages, plain.messages[0].model_copy(update={"role": "assistant"}))}
    )
    asked = [plain, hostile, Request(**dict(opened))]
    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    with Raw(serve) as server:
        model = RemoteModel("t", asker.model(server.url, 8), takes_token_ids=True, dedicated=True, tokenizer=tokenizer)
        assert len(ask_remote(asked, model, ledger, SCOPE)) == 3
    prompts = [prompt for body in bodies for prompt in body["prompt"]]
    assert sorted(prompts) == sorted(template.prompts_tokens(tokenizer, [request.messages for request in asked]))


def test_an_error_of_rendering_is_the_caller_s(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    model = RemoteModel("t", asker.model("http://127.0.0.1:9/v1", 8), takes_token_ids=True, tokenizer=tokenizer)
    monkeypatch.setattr(template, "prompt_tokens", lambda *_: [1])
    with pytest.raises(TemplateError, match="cannot be rendered"):
        ask_remote(requests("unrendered", 1), model, ledger, SCOPE)
