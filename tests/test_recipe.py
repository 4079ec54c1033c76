"""The keys that a published recipe needs: what is sent to which model, when, and with which prompts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from raw_server import Raw, answer

from stepladder import cli
from stepladder.ask.request import Request
from stepladder.config import Config, Model, Predict, Rung, Train, Variants, load, settings
from stepladder.context import Context
from stepladder.errors import ConfigError, InputError
from stepladder.mcq.chainfile import read_chains
from stepladder.records import Message
from stepladder.stages import flow

TOML = """
name = "run"
language = "en"

[questions]
train = "train.jsonl"
validation = 0.05

[models.mini]
engine = "openai"
model = "mini-1"
base_url = "URL"
price = { input = 1.0, output = 2.0 }
MODEL

[models.large]
engine = "openai"
model = "large-1"
base_url = "URL"
price = { input = 1.0, output = 2.0 }

[[rung]]
name = "easy"
models = ["mini"]
RUNG

[[rung]]
name = "hard"
models = ["large"]
HARD

[[member]]
name = "a"
"""
QUESTIONS = 12


class Project(NamedTuple):
    """Twelve questions, and a server of two models that keeps what it was sent."""

    folder: Path
    server: Raw

    def write(self, **places: str) -> Config:
        text = TOML.replace("URL", self.server.url)
        for place in ("MODEL", "RUNG", "HARD"):
            text = text.replace(place, places.get(place.lower(), ""))
        (self.folder / "run.toml").write_text(text)
        return load(self.folder / "run.toml")

    def run(self, *stages: str) -> int:
        for stage in stages:
            sys.argv = ["stepladder", stage, "run.toml"]
            with pytest.raises(SystemExit) as ended:
                cli.main()
            if ended.value.code:
                return int(ended.value.code)
        return 0

    def bodies(self, model: str) -> list[dict[str, Any]]:
        """The bodies of the requests to a model."""
        bodies = [json.loads(body) for body in self.server.bodies]
        return [body for body in bodies if body["model"] == model]

    def rows(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs/run" / file).read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "runs/run/samples/summary.json").read_text())
        return summary


def says(letter: Callable[[dict[str, Any]], str]) -> Callable[[str, bytes], bytes]:
    """A server whose answers end in the letter that a function takes from the request's body."""

    def reply(head: str, body: bytes) -> bytes:
        content = answer(f"Because.\nAnswer: {letter(json.loads(body))}")
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )

    return reply


def right(body: dict[str, Any]) -> str:
    """The letter at which the body's prompt shows Ann, who is always right."""
    line: str = next(line for line in body["messages"][-1]["content"].splitlines() if line.endswith(". Ann"))
    return line[0]


def wrong(body: dict[str, Any]) -> str:
    return "B" if right(body) == "A" else "A"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Project]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    question = {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"}
    rows = ({"id": f"p{n:02}", "problem": f"Problem {n:02}.", "questions": [question]} for n in range(QUESTIONS))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    servers = []

    def project(letter: Callable[[dict[str, Any]], str]) -> Project:
        servers.append(Raw(says(letter)).__enter__())
        return Project(tmp_path, servers[-1])

    yield project
    for server in servers:
        server.__exit__()


def test_sampling_settings_and_a_models_own_keys_are_in_every_request(make: Callable[..., Project]) -> None:
    project = make(right)
    project.write(
        model='extra_body = { thinking = { type = "disabled" } }',
        rung="samples = 2\ntemperature = 0.7\ntop_p = 0.9\nseed = 40",
    )
    assert project.run("questions", "samples") == 0
    bodies = project.bodies("mini-1")
    assert {(body["temperature"], body["top_p"], body["seed"]) for body in bodies} == {(0.7, 0.9, 40), (0.7, 0.9, 41)}
    assert all(body["thinking"] == {"type": "disabled"} and "top_k" not in body for body in bodies)
    sent = len(project.server.bodies)
    project.write(rung="samples = 2\ntemperature = 0.7\ntop_p = 0.9\nseed = 40")
    assert project.run("samples") == 0
    assert len(project.server.bodies) == 2 * sent, "a model with another body gives other answers"


def test_top_k_goes_to_servers_of_ones_own_only(make: Callable[..., Project]) -> None:
    project = make(right)
    with pytest.raises(ConfigError, match=r"rung 'easy' has top_k.*'mini' has a price; leave it out"):
        project.write(rung="temperature = 0.7\ntop_k = 20")
    free = TOML.replace("URL", project.server.url).replace("input = 1.0, output = 2.0", "input = 0, output = 0")
    free = free.replace("RUNG", "temperature = 0.7\ntop_k = 20").replace("HARD", "").replace("MODEL", "")
    (project.folder / "own.toml").write_text(free)
    assert load(project.folder / "own.toml").rung[0].top_k == 20


@pytest.mark.parametrize("key", ["max_tokens", "n", "service_tier"])
def test_a_models_own_keys_change_neither_what_the_file_sets_nor_the_price(key: str) -> None:
    with pytest.raises(ValueError, match=f"extra_body may not hold '{key}'"):
        Model.model_validate(
            {
                "engine": "openai",
                "base_url": "http://x/v1",
                "price": {"input": 1, "output": 1},
                "extra_body": {key: 5},
            }
        )
    with pytest.raises(ValueError, match="'extra_body' is for engine = 'openai'"):
        Model.model_validate({"extra_body": {"thinking": {}}})


@pytest.mark.parametrize("table", [Predict, Rung, Variants])
@pytest.mark.parametrize("key", ["top_p", "top_k", "seed"])
def test_a_setting_that_greedy_decoding_ignores_is_refused(table: Any, key: str) -> None:
    needed = {} if table is Predict else {"name": "r", "models": ["m"]} if table is Rung else {"models": ["m"]}
    with pytest.raises(ValueError, match=f"{key} needs temperature above 0"):
        table.model_validate({**needed, key: 1, "temperature": 0})
    assert getattr(table.model_validate({**needed, key: 1, "temperature": 0.5}), key) == 1


def test_keys_that_are_not_set_leave_old_folders_up_to_date() -> None:
    assert not {"top_p", "top_k", "seed"} & settings(Predict()).keys()
    assert settings(Predict(temperature=1, top_p=0.7, top_k=20))["top_k"] == 20
    assert "weight_decay" not in settings(Train())
    assert settings(Train(weight_decay=0.1))["weight_decay"] == 0.1
    plain = Request(model="m", messages=(Message(role="user", content="x"),), max_tokens=1)
    assert not {"top_k", "seed"} & json.loads(plain.identity()).keys()
    assert plain.model_copy(update={"top_k": 20}).identity() != plain.identity()


def test_weights_here_draw_from_the_tokens_that_are_left() -> None:
    torch = pytest.importorskip("torch")
    from stepladder.ask.local.decoding import _choose

    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))

    def drawn(**sampling: Any) -> set[int]:
        request = Request(model="m", messages=(), max_tokens=1, temperature=1.0, **sampling)
        return {_choose(logits, [(request, torch.Generator().manual_seed(n))])[0] for n in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.65) == {0, 1}
    assert drawn(top_k=3, top_p=0.4) == {0}


def test_a_rung_votes_only_where_its_first_answer_is_wrong(make: Callable[..., Project]) -> None:
    def odd_ones_fail_at_first(body: dict[str, Any]) -> str:
        problem = int(body["messages"][-1]["content"].split("Problem ")[1][:2])
        return wrong(body) if problem % 2 and body["seed"] == 0 else right(body)

    project = make(odd_ones_fail_at_first)
    hard = 'accept = "majority"\nsamples = 5\ntemperature = 0.7\nseed = 0\n'
    config = project.write(rung=f"{hard}samples_after_miss = true")
    assert project.run("questions", "samples") == 0
    train = project.rows("questions/train.jsonl")
    missed = {row["id"] for row in train if int(row["id"][1:3]) % 2}
    assert len(project.bodies("mini-1")) == len(train) + 4 * len(missed)
    assert not project.bodies("large-1")
    accepted = project.rows("samples/accepted.jsonl")
    assert {
        row["question_id"]: len([r for r in accepted if r["question_id"] == row["question_id"]]) for row in accepted
    } == {row["id"]: 4 if row["id"] in missed else 1 for row in train}
    assert "samples_after_miss" not in settings(config.rung[1])


def test_a_dear_rung_may_be_asked_what_is_solved_already(make: Callable[..., Project]) -> None:
    project = make(lambda body: wrong(body) if body["model"] == "mini-1" and " 03." in str(body) else right(body))
    project.write(hard="also_solved = true")
    assert project.run("questions", "samples") == 0
    train = {row["id"] for row in project.rows("questions/train.jsonl")}
    left = train & {"p03#0"}
    by_rung = {
        rung: {row["question_id"] for row in project.rows("samples/accepted.jsonl") if row["rung"] == rung}
        for rung in ("easy", "hard")
    }
    assert by_rung == {"easy": train - left, "hard": train}
    easy, hard = project.summary()["rungs"]
    assert (easy["asked"], easy["solved"], easy["repeated"]) == (len(train), len(train - left), 0)
    assert (hard["asked"], hard["solved"], hard["repeated"]) == (len(left), len(left), len(train - left))
    assert project.summary()["unsolved"] == 0
    sent = len(project.server.bodies)
    project.write()
    assert project.run("samples") == 0
    assert len(project.server.bodies) == sent, "what was bought is not bought again"
    assert {row["question_id"] for row in project.rows("samples/accepted.jsonl") if row["rung"] == "hard"} == left


@pytest.mark.parametrize(
    ("place", "keys", "said"),
    [
        ("rung", "also_solved = true", "rung 'easy' has also_solved, but no rung before it solves anything"),
        (
            "rung",
            "samples = 3\ntemperature = 1\nsamples_after_miss = true",
            'samples_after_miss needs accept = "majority"',
        ),
        ("hard", 'accept = "majority"\nsamples_after_miss = true', "and samples above 1"),
        ("model", 'prompts = "none"', "key 'models.mini.prompts': .*none is not a folder"),
        ("hard", '[predict]\nprompts = "none"', "key 'predict.prompts': .*none is not a folder"),
    ],
)
def test_keys_that_make_no_sense(make: Callable[..., Project], place: str, keys: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(right).write(**{place: keys})


def test_each_model_and_the_student_may_have_prompts_of_their_own(make: Callable[..., Project]) -> None:
    project = make(right)
    for name in ("all", "mini", "student"):
        (project.folder / name).mkdir()
        (project.folder / name / "system.j2").write_text(f"You are {name}.")
    keys = {"model": 'prompts = "mini"', "hard": 'also_solved = true\n[predict]\nprompts = "student"'}
    config = project.write(**keys)
    text = (project.folder / "run.toml").read_text()
    (project.folder / "run.toml").write_text(f'prompts = "all"\n{text}')
    assert config.student_prompts == project.folder / "student"
    assert project.run("questions", "samples", "trainset") == 0
    heads = {
        model: {body["messages"][0]["content"] for body in project.bodies(model)} for model in ("mini-1", "large-1")
    }
    assert heads == {"mini-1": {"You are mini."}, "large-1": {"You are all."}}
    assert {row["messages"][0]["content"] for row in project.rows("trainset/a/train.jsonl")} == {"You are student."}
    context = Context.open(Path("run.toml"), Path("runs"))
    assert flow.stage("samples").artifact(context, None).state() == "done"
    (project.folder / "student" / "system.j2").write_text("You are another.")
    assert flow.stage("samples").artifact(context, None).state() == "done"
    assert flow.stage("trainset").artifact(context, "a").state() == "stale"
    (project.folder / "mini" / "system.j2").write_text("You are new.")
    assert flow.stage("samples").artifact(context, None).state() == "stale"


def test_chains_that_one_has_are_a_rung_that_costs_nothing(
    make: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    project = make(right)
    rows = [
        {"id": "p01#0", "chain": "Ann it is.\nAnswer: A", "model": "an old friend"},
        {"id": "p02#0", "chain": "Bob it is.\nAnswer: B"},
        {"id": "p04#0", "chain": "Who knows."},
        {"id": "elsewhere#7", "chain": "Answer: A"},
    ]
    file = project.folder / "chains.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (
        TOML.replace("URL", project.server.url).replace("MODEL", "").replace("RUNG", "").replace("HARD", "")
    ).replace("[[rung]]", '[[rung]]\nname = "mine"\nchains = "chains.jsonl"\n\n[[rung]]', 1)
    (project.folder / "run.toml").write_text(text)
    assert project.run("questions", "samples") == 0
    train = {row["id"] for row in project.rows("questions/train.jsonl")}
    mine, easy, _ = project.summary()["rungs"]
    assert (mine["kind"], mine["asked"], mine["solved"]) == ("chains", len(train), len(train & {"p01#0"}))
    assert (mine["wrong"], mine["unparsed"]) == (len(train & {"p02#0"}), len(train & {"p04#0"}))
    assert easy["asked"] == len(train - {"p01#0"}) == len(project.bodies("mini-1"))
    (sample,) = (row for row in project.rows("samples/accepted.jsonl") if row["rung"] == "mine")
    assert (sample["model"], sample["micro_dollars"], sample["key"][:7]) == ("an old friend", 0, "chains:")
    assert project.run("plan") == 0
    assert "mine: solves" in capsys.readouterr().out
    context = Context.open(Path("run.toml"), Path("runs"))
    assert flow.stage("samples").artifact(context, None).state() == "done"
    file.write_text(json.dumps(rows[3]) + "\n")
    assert flow.stage("samples").artifact(context, None).state() == "stale"
    assert project.run("samples") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "chains.jsonl has no chain for a training question; compare the ids" in said
    file.write_text("no JSON")
    sent = len(project.server.bodies)
    assert project.run("samples") == 2
    assert len(project.server.bodies) == sent, "the file is read before anything is bought"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "chains.jsonl:1: field 'id': must be a text that is not empty"),
        ('{"id": "p01#0", "chain": " "}', "chains.jsonl:1: field 'chain': must be a text"),
        ('{"id": "p01#0", "chain": "x", "model": 3}', "chains.jsonl:1: field 'model': must be a text"),
        ("[]", "chains.jsonl:1: is not an object"),
        ("", "holds no chains"),
    ],
)
def test_a_file_of_chains_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "chains.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match=re.escape(said)):
        read_chains(tmp_path / "chains.jsonl")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"chains": "x", "models": ["m"]}, "a rung of kind 'ask' needs models, one of another kind takes none"),
        ({"chains": "x", "kind": "worked"}, "a rung of kind 'chains' needs the key chains"),
        ({"kind": "chains"}, "a rung of kind 'chains' needs the key chains"),
        ({"chains": "x", "temperature": 0.5}, "a rung with chains asks no model, so temperature does nothing"),
        ({"chains": "x", "batch": True}, "so batch does nothing; leave it out"),
    ],
)
def test_a_rung_with_chains_asks_nobody(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rung.model_validate({"name": "r", **keys})
