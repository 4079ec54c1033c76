"""Work on pieces of files gives the bytes of one piece, whoever does it, and however often it is disturbed."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from test_questions import Stage, line, problem, stage
from test_serving import until

from stepladder import records
from stepladder.errors import PieceError
from stepladder.nodes import Slot
from stepladder.nodes.here import Here, RunningHere
from stepladder.shards.each import ATTEMPTS, Pool
from stepladder.shards.proofs import PROVED, Program
from stepladder.stages import questions

__all__ = ["stage"]  # a fixture
NAMES = ["Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]


def told(dice: random.Random) -> str:
    return " ".join(
        f"{dice.choice(NAMES)} is {dice.choice(NAMES)}'s {n}th friend since {dice.random()}." for n in range(9)
    )


def files(dice: random.Random, count: int = 60) -> dict[str, list[dict[str, object]]]:
    """Training problems, some of them odd, repeated or near to one of the test, and reviews."""
    train = [problem(f"p{n}", line(), line(answer="B"), text=told(dice)) for n in range(count)]
    test = [problem(f"t{n}", line(answer=None), text=told(dice)) for n in range(9)]
    train[7]["problem"] = train[count - 3]["problem"] = test[4]["problem"]
    train[20]["problem"] = train[count - 1]["problem"]
    train[11]["problem"] = "A line.\\n"
    reviewed = [{"id": "p3#1", "action": "drop"}, {"id": f"p{count - 2}#0", "action": "relabel", "answer": "B"}]
    return {"train": train, "test": test, "reviewed": reviewed}


def made(stage: Stage) -> dict[str, bytes]:
    """What the stage has made, without its manifest, which holds a time."""
    return {file.name: file.read_bytes() for file in stage.made.iterdir() if file.name != "manifest.json"}


def test_many_pieces_give_the_bytes_of_one(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.write(**files(random.Random(1)))
    assert stage.run() == 0
    whole = made(stage)
    assert [count > 0 for count in json.loads(whole["audit.json"])["questions"].values()] == [True] * 3
    assert len(json.loads(whole["audit.json"])["counts"]) == 3
    (stage.made / "manifest.json").unlink()
    monkeypatch.setattr(questions, "PIECE_BYTES", 5000)
    assert len(records.spans(Path("train.jsonl"), 5000)) > 4
    assert stage.run() == 0
    assert made(stage) == whole


def test_the_first_error_is_the_one_of_one_piece(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = files(random.Random(2))
    for number in (25, 26, 50):
        rows["train"][number] = problem(f"p{number}", line(answer="Z"))
    stage.write(**rows)
    assert stage.run() == 2
    said = capsys.readouterr().err
    assert "train.jsonl:26: field 'questions[0].answer'" in said
    monkeypatch.setattr(questions, "PIECE_BYTES", 3000)
    assert stage.run() == 2
    assert capsys.readouterr().err == said
    assert not stage.made.exists()


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_spans_are_whole_lines(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file.jsonl"
    file.write_bytes('\ufeff1\n\n"\u2028é"\r\n[3]'.encode())
    whole = [*records.parse_lines(file)]
    assert whole == [(1, 1), (3, "\u2028é"), (4, [3])]
    assert [row for span in records.spans(file, size) for row in records.parse_lines(file, span)] == whole


def test_an_empty_file_has_no_span(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert records.spans(tmp_path / "empty", 10) == []


class Unreliable(Here):
    """Kills so many of the commands that it is to run."""

    def __init__(self, kills: int) -> None:
        super().__init__()
        self.kills, self.commands = kills, 0

    @contextlib.contextmanager
    def running(
        self, slot: Slot, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Iterator[RunningHere]:
        self.commands += 1
        with super().running(slot, command, environment, log) as process:
            if self.commands <= self.kills:
                process._child.kill()
            yield process


def orders(file: Path, choices: Path) -> list[dict[str, object]]:
    choices.write_text('{"held_out": [], "reviews": {}}')
    common = {"file": str(file), "language": "en", "labelled": False, "choices": str(choices)}
    return [{**common, "span": span} for span in records.spans(file, 1)]


def test_a_lost_piece_is_done_again(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(problem(f"t{n}")) + "\n" for n in range(3)))
    nodes, reports = Unreliable(2), list[tuple[str, int, int]]()
    pool = Pool(nodes, tmp_path, lambda *report: reports.append(report))
    results = pool.each("splits", "questions", orders(file, tmp_path / "choices"))
    assert [records.read(result / "test.jsonl", records.Question)[0].id for result in results] == [
        "t0#0",
        "t1#0",
        "t2#0",
    ]
    assert nodes.commands == 5
    assert reports[-1] == ("questions", 3, 3)
    assert pool.each("splits", "questions", orders(file, tmp_path / "choices")) == results
    assert nodes.commands == 5


def test_what_is_lost_every_time_is_said(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(problem(f"t{n}")) + "\n" for n in range(2)))
    pool = Pool(Unreliable(100), tmp_path, lambda *report: None)
    with pytest.raises(
        PieceError, match=rf"^splits of a piece ended {ATTEMPTS} times without a result \(exit code -9\)"
    ):
        pool.each("splits", "questions", orders(file, tmp_path / "choices"))


def test_a_killed_stage_leaves_no_process_and_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.write(**files(random.Random(3)))
    assert stage.run() == 0
    whole = made(stage)
    (stage.made / "manifest.json").unlink()
    code = "from stepladder.stages import questions; questions.PIECE_BYTES = 3000; import stepladder.cli as c; c.main()"
    command = [sys.executable, "-c", code, "questions", "run.toml"]
    scratch = stage.made.parent / ".questions.scratch"
    for seen in (2, 8):
        with subprocess.Popen(command) as child:
            until(lambda seen=seen: len([*scratch.glob("[a-z]*-*.json")]) >= seen)
            below = psutil.Process(child.pid).children(recursive=True)
            child.kill()
        until(lambda below=below: not any(process.is_running() for process in below))
    monkeypatch.setattr(questions, "PIECE_BYTES", 3000)
    assert stage.run() == 0
    assert made(stage) == whole
    assert not scratch.exists()


def test_programs_are_proved_alike_in_any_pieces(tmp_path: Path) -> None:
    base = "is(ann,kind). is(bob,loud)."
    rules = {
        "right": "opt(0) :- is(ann,kind). opt(1) :- not is(ann,kind).",
        "wrong": "opt(1) :- is(ann,kind). opt(0) :- not is(ann,kind).",
        "none": "opt(0) :- is(ann,loud). opt(1) :- is(bob,kind).",
        "broken": "opt(0) :- is(ann",
        "again": "opt(0) :- is(bob,loud). opt(1) :- not is(bob,loud).",
    }
    programs = [Program(name, "writer", base, rule, 2, "A") for name, rule in rules.items()]
    for size in (1, 2, 5):
        pool = Pool(Here(), tmp_path / str(size), lambda *report: None)
        pool.folder.mkdir()
        pieces = [{"programs": programs[start : start + size]} for start in range(0, len(programs), size)]
        results = pool.each("proofs", "proofs", pieces)
        proved = [name for result in results for name in json.loads((result / PROVED).read_text())]
        assert proved == ["right", "again"]
