"""``stepladder doctor --models``: whether servers list the models of a TOML file, asked over real HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_server import Raw

from stepladder import cli

TOML = """
name = "run"
language = "en"
[questions]
train = "train.jsonl"
[models.teacher]
engine = "openai"
model = "large-2"
api_key_env = "TEACHER_KEY"
price = { input = 1.0, output = 2.0 }
ADDRESS
[models.student]
[[rung]]
name = "easy"
models = ["teacher"]
[[member]]
name = "a"
"""
KEY = "secret-key"


def http(status: int, body: object) -> Callable[[str, bytes], bytes]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda head, sent: f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def listing(*names: str, shutdown_date: str | None = None) -> dict[str, object]:
    return {"data": [{"id": name, "shutdown_date": shutdown_date} for name in names]}


@pytest.fixture
def doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "300")

    def run(address: str) -> tuple[int, str]:
        (tmp_path / "run.toml").write_text(TOML.replace("ADDRESS", address))
        monkeypatch.setattr(sys, "argv", ["stepladder", "doctor", "--models", str(tmp_path / "run.toml")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        return int(ended.value.code or 0), said.out + said.err

    return run


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        (http(200, listing("large-2", "small-1")), 0, "large-2 is listed by"),
        (http(200, listing("large-2", shutdown_date="2027-01-14")), 0, "it is shut down on 2027-01-14"),
        (http(200, listing("large-3", "tiny")), 2, "does not list large-2; correct 'model' in [models.teacher]; of 2"),
        (http(200, listing()), 2, "the nearest: none"),
        (http(404, {"error": {}}), 0, "has no list of models (HTTP 404), so large-2 is unchecked"),
        (http(200, b"<html>"), 0, "replies with no list of models, so large-2 is unchecked"),
        (http(200, {"data": [1]}), 0, "replies with no list of models"),
        (http(401, {"error": {}}), 2, "refuses the API key (HTTP 401); put the right one into TEACHER_KEY"),
        (http(500, b""), 2, "gives no list of models (HTTP 500); try again"),
        (lambda head, sent: b"", 2, "cannot be reached"),
    ],
)
def test_what_a_server_says_of_a_model(
    doctor: Callable[[str], tuple[int, str]], reply: Callable[[str, bytes], bytes], code: int, said: str
) -> None:
    with Raw(reply) as server:
        found = doctor(f'base_url = "{server.url}"')
        assert found[0] == code
        assert said in found[1]
        assert "no server lists them" in found[1], "weights of one's own"
        assert {tuple(head.split(" ")[:2]) for head in server.heads} == {("GET", "/v1/models")}
        assert f"Bearer {KEY}" in server.heads[0]


def test_every_server_is_asked_and_one_that_differs_fails(doctor: Callable[[str], tuple[int, str]]) -> None:
    with Raw(http(200, listing("large-2"))) as good, Raw(http(200, listing("large-1"))) as bad:
        code, said = doctor(f'base_url = ["{good.url}", "{bad.url}"]')
    assert code == 2
    assert f"large-2 is listed by {good.url}" in said
    assert f"{bad.url} does not list large-2" in said


def test_what_cannot_be_asked_is_named(
    doctor: Callable[[str], tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor('base_url_file = "servers.txt"')[0] == 2
    (tmp_path / "servers.txt").write_text("# none yet\n")
    code, said = doctor('base_url_file = "servers.txt"')
    assert (code, "names no server yet" in said) == (2, True)
    monkeypatch.delenv("TEACHER_KEY")
    code, said = doctor('base_url = "http://127.0.0.1:9/v1"')
    assert (code, "environment variable TEACHER_KEY is not set" in said) == (2, True)


def test_a_cluster_that_cannot_be_used_is_said(
    doctor: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TOML", TOML + '[cluster]\nscheduler = "slurm"\n')
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    code, said = doctor('base_url = "http://127.0.0.1:9/v1"')
    assert code == 2
    assert "[cluster]  scheduler = 'slurm': this is not inside a Slurm job; start it in one" in said
