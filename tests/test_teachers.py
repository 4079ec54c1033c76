"""A rung whose teacher is an API, through the command line a user types."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from api_server import ApiServer

from stepladder import cli

TOML = """
name = "taught"
language = "en"

[limits]
dollars = {dollars}

[questions]
train = "train.jsonl"
validation = 0.2

[models.teacher]
engine = "openai"
model = "test-model"
base_url = "{url}"
api_key_env = "TEACHER_KEY"
price = {{ input = 1.0, output = 2.0 }}

[[rung]]
name = "medium"
models = ["teacher"]
max_tokens = 40

[[member]]
name = "a"
"""


class Terminal:
    """The command line, in a folder with twenty questions."""

    def __init__(
        self, folder: Path, api: ApiServer, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.api, self._patch, self._capture = folder, api, patch, capture
        patch.chdir(folder)
        patch.setenv("TEACHER_KEY", "test-key")
        patch.setenv("COLUMNS", "140")
        question = {"question": "Who?", "options": ["Ann", "Bob", "Cleo"], "answer": "A"}
        problems = ({"id": f"p{n}", "problem": f"Problem {n}.", "questions": [question]} for n in range(20))
        (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
        self.cap(1.0)

    def cap(self, dollars: float) -> None:
        (self.folder / "run.toml").write_text(TOML.format(url=self.api.url, dollars=dollars))

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and all that was printed with runs of spaces made one."""
        self._patch.setattr(sys, "argv", ["stepladder", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capture.readouterr()
        return int(ended.value.code or 0), " ".join((out + err).split())


@pytest.fixture
def terminal(
    tmp_path: Path, api: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    api.set_script({})
    return Terminal(tmp_path, api, monkeypatch, capsys)


def test_an_api_teaches_once_and_its_cost_is_told(terminal: Terminal, api: ApiServer) -> None:
    assert terminal.run("questions", "run.toml")[0] == 0
    before = api.settled()["micro_dollars"]
    code, said = terminal.run("samples", "run.toml")
    assert code == 0
    assert "rung medium:" in said
    paid = api.settled()["micro_dollars"] - before
    samples = terminal.folder / "runs/taught/samples"
    accepted = [json.loads(line) for line in (samples / "accepted.jsonl").read_text().splitlines()]
    rejected = [json.loads(line) for line in (samples / "rejected.jsonl").read_text().splitlines()]
    assert len(accepted) + len(rejected) == 16
    # It always says A, so it is right exactly where the label was shuffled there.
    assert all(sample["permutation"][0] == 0 for sample in accepted)
    assert all(sample["permutation"][0] != 0 for sample in rejected)
    assert sum(sample["micro_dollars"] for sample in [*accepted, *rejected]) == paid
    code, said = terminal.run("ledger", "run.toml", "--export", "all.jsonl")
    assert code == 0
    assert "medium teacher 16 answered" in said
    assert f"${paid / 1e6:.4f} in all" in said
    rows = [json.loads(line) for line in (terminal.folder / "all.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {json.loads(row["raw"])["object"] for row in rows} == {"chat.completion"}
    assert all(row["request"]["messages"][1]["content"].startswith("Problem ") for row in rows)
    assert f"${paid / 1e6:.2f} spent" in terminal.run("status", "run.toml")[1]


def test_a_cap_stops_the_rung_and_a_higher_one_goes_on(terminal: Terminal, api: ApiServer) -> None:
    terminal.cap(0.001)  # a little more than the worst case of one request
    terminal.run("questions", "run.toml")
    before = api.settled()
    code, said = terminal.run("samples", "run.toml")
    assert code == 1
    assert "the cap is reached ($0.0010 for the run)" in said
    assert "raise the cap and run again" in said
    assert not (terminal.folder / "runs/taught/samples").exists()
    some = api.settled()["billed"] - before["billed"]
    assert 0 < some < 16
    terminal.cap(1.0)
    assert terminal.run("samples", "run.toml")[0] == 0
    assert api.settled()["billed"] - before["billed"] == 16


def test_a_rung_may_go_through_the_batch_api_at_half_the_price(terminal: Terminal, api: ApiServer) -> None:
    config = terminal.folder / "run.toml"
    config.write_text(config.read_text().replace("max_tokens = 40", "max_tokens = 40\nbatch = true"))
    assert terminal.run("questions", "run.toml")[0] == 0
    before = api.settled()
    assert terminal.run("samples", "run.toml")[0] == 0
    after = api.settled()
    assert after["billed"] - before["billed"] == 16
    assert all(entry["custom_id"] for entry in [e for e in api.log() if e["event"] == "billed"][-16:])
    spent = f"${(after['micro_dollars'] - before['micro_dollars']) / 1e6:.4f} in all"
    assert spent in terminal.run("ledger", "run.toml")[1]
    config.write_text(config.read_text().replace(f'base_url = "{api.url}"', f'base_url = ["{api.url}", "http://b/v1"]'))
    code, said = terminal.run("samples", "run.toml")
    assert code == 2
    assert "batch = true, which needs models with engine = 'openai' and one base_url" in said
