"""Links in the place of our files, texts that a terminal would act upon, files that unpack to more than memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.table import Table

from stepladder import records, workspace
from stepladder.config import load
from stepladder.errors import ConfigError, InputError, UserError
from stepladder.mcq import formats
from stepladder.progress import Progress
from stepladder.supervise import supervised
from stepladder.terminal import PlainConsole, say, table
from stepladder.workspace import Artifact, Workspace, write_atomic

# Links


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    write_atomic(tmp_path / "out", "new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", [".samples.partial", ".samples.scratch", "samples"])
def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "fingerprint").write_text("kept")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    artifact = Artifact(tmp_path / "samples", {}, {})
    with pytest.raises(UserError, match="is a link; remove it"):
        if "scratch" in name:
            artifact.scratch("float32")
        else:
            with artifact.writing():
                pass
    assert (tmp_path / "elsewhere" / "fingerprint").read_text() == "kept"


def test_a_lock_that_is_a_link_or_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    run = Workspace(tmp_path, "demo")
    run.folder.mkdir()
    lock = run.folder / ".lock"
    lock.symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match=r"\.lock: cannot be opened \(it is a link\)"), run.locked():
        pass
    assert not (tmp_path / "new").exists()
    lock.unlink()
    lock.mkdir()
    advice = r"\.lock: cannot be opened \(Is a directory\); remove it, or make it writable"
    with pytest.raises(UserError, match=advice), run.locked():
        pass
    lock.rmdir()
    with (
        run.locked(),
        pytest.raises(UserError, match="another stepladder process is working on this run"),
        run.locked(),
    ):
        pass
    with run.locked():
        pass


def test_a_log_is_never_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic"), supervised(["true"], tmp_path / "log", {}):
        pass
    assert not (tmp_path / "new").exists()


# A full disk, and edits


def test_a_full_disk_is_one_line_for_a_stage(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    artifact = Artifact(tmp_path / "merged", {}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(UserError, match=r"merged: cannot be written \(File too large\); free some space"),
            artifact.writing() as folder,
        ):
            (folder / "weights").write_bytes(b"0" * 10_000)
        with pytest.raises(UserError, match=r"out: cannot be written \(File too large\); free some space"):
            write_atomic(tmp_path / "out", "0" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_keeps_the_size_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact(tmp_path / "samples", {}, {})
    with artifact.writing() as folder:
        (folder / "a.jsonl").write_text("right")
        (folder / "b.jsonl").write_text("right")
    assert artifact.state() == "done"
    later = tmp_path / "samples" / "manifest.json"
    while (tmp_path / "samples" / "a.jsonl").stat().st_ctime_ns <= later.stat().st_ctime_ns:
        (tmp_path / "samples" / "a.jsonl").write_text("right")  # written again, but the same
    assert artifact.state() == "done"
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "file_digest", lambda path: pytest.fail("reads it again and again"))
        assert artifact.state() == "done"
    while (tmp_path / "samples" / "b.jsonl").stat().st_ctime_ns <= later.stat().st_ctime_ns:
        (tmp_path / "samples" / "b.jsonl").write_text("wrong")
    os.utime(tmp_path / "samples" / "b.jsonl", ns=(0, 0))
    assert artifact.state() == "stale"
    assert artifact.edited() == ["b.jsonl"]
    with pytest.raises(UserError, match=r"b\.jsonl was changed since it was made; 'stepladder run' makes it again"):
        artifact.digest()


# What is too much to read


def test_a_toml_file_that_is_too_deep_or_too_large_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("a = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(path)
    path.write_text("#" * 2_000_000)
    with pytest.raises(ConfigError, match="larger than 1,000,000 bytes"):
        load(path)


def test_lines_and_files_that_are_too_long_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(records, "MAX_TEXT_BYTES", 2000)
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "1"}\n' + " " * 990 + '"tail"\n' + '"' + "x" * 2000 + '"\n')
    read = records.parse_lines(path)
    assert [next(read), next(read)] == [(1, {"id": "1"}), (2, "tail")]
    with pytest.raises(InputError, match=r"questions\.jsonl:3: is longer than 1,000 bytes; split it"):
        next(read)
    with pytest.raises(InputError, match="is larger than 2,000 bytes"):
        records.read_text(path)


def test_deep_json_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        formats.guess(path)


PARQUET = """
import resource, sys
import pyarrow as pa, pyarrow.parquet as pq
texts = pa.DictionaryArray.from_arrays(pa.array([0] * int(sys.argv[2]), pa.int32()), pa.array(["x" * int(sys.argv[3])]))
pq.write_table(pa.table({"question": texts, "options": texts, "answer": texts}), sys.argv[1], compression="zstd")
"""
READ = """
import resource, sys
from pathlib import Path
from stepladder.errors import InputError
from stepladder.mcq.formats import Columns, table
from stepladder.records import WHOLE_FILE
try:
    for row in table(Path(sys.argv[1]), Columns(options=("options", "answer")), WHOLE_FILE):
        pass
except InputError as error:
    print(error)
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024)
"""


@pytest.mark.parametrize(("rows", "characters"), [(1000, 1_000_000), (2, 30_000_000)])
def test_a_small_parquet_file_does_not_unpack_to_gigabytes(tmp_path: Path, rows: int, characters: int) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "bomb.parquet"
    subprocess.run([sys.executable, "-c", PARQUET, path, str(rows), str(characters)], check=True)
    assert path.stat().st_size < 200_000
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
    said, mebibytes = done.stdout.splitlines()
    assert "bomb.parquet: unpacks to more than" in said
    assert int(mebibytes) < 1500


# The terminal

NAUGHTY = "[/red][link=file:///etc/passwd]x[/link]\x1b]52;c;cm0gLXJm\x07\x9b2J\x1b[31m\u202e"


def is_tame(text: str) -> bool:
    return "[/red]" in text and "\\x1b]52" in text and not any(c in text for c in "\x1b\x07\x9b\u202e")


def test_a_stranger_s_text_is_printed_as_text() -> None:
    screen = StringIO()
    console = PlainConsole(file=screen, width=400)
    rows = table(["id"])
    rows.add_row(NAUGHTY)
    grid = Table(title=NAUGHTY)
    grid.add_column(NAUGHTY)
    progress = Progress(console)

    def stage() -> None:
        with progress.stage(NAUGHTY):
            progress.update(NAUGHTY, 1, 2, NAUGHTY)

    shows: list[Callable[[], None]] = [
        lambda: console.print(NAUGHTY),
        lambda: console.print(rows),
        lambda: console.print(grid),
        lambda: say(console, NAUGHTY),
        lambda: progress.say(NAUGHTY),
        lambda: progress.up_to_date(NAUGHTY),
        stage,
    ]
    for show in shows:
        screen.seek(screen.truncate(0))
        show()
        assert is_tame(screen.getvalue()), screen.getvalue()


def test_a_live_terminal_keeps_its_colours_and_nothing_else() -> None:
    screen = StringIO()
    console = PlainConsole(file=screen, width=400, force_terminal=True, color_system="standard")
    console.print(NAUGHTY, style="red", highlight=False)
    assert screen.getvalue().startswith("\x1b[31m")
    assert screen.getvalue().count("\x1b") == 2
    screen.seek(screen.truncate(0))
    with Progress(console).stage("[/red]\x1b]52;c;x\x07"):
        pass
    assert "]52" in screen.getvalue()
    assert "\x1b]52" not in screen.getvalue()


def test_the_commands_print_through_it(tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").write_text(
        json.dumps({"id": NAUGHTY, "gold": "A", "votes": {"m[/b]": ["B"], "n": ["B"], "o": ["B"]}}) + "\n"
        + "".join(json.dumps({"id": f"{n}", "gold": "A", "votes": {m: ["A"] for m in ("m[/b]", "n", "o")}}) + "\n"
                  for n in range(5))
    )  # fmt: skip
    words = [sys.executable, "-m", "stepladder", "audit", "--votes", "votes.jsonl", "--out", "out.jsonl"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_tame(done.stdout.replace("\n", "")) or "…" in done.stdout
    words[-1] = "no\x1b]52;c;x\x07where/out.jsonl"
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1
    (tmp_path / "votes.jsonl").write_text(json.dumps({"id": "x" * 100_000, "gold": "A", "votes": 1}) + "\n")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr) < 3000


def test_no_other_console_is_made() -> None:
    source = Path(workspace.__file__).parent
    assert [path.name for path in source.rglob("*.py") if " Console(" in path.read_text(encoding="utf-8")] == []
    assert [p.name for p in source.rglob("*.py") if "rich.markup" in p.read_text(encoding="utf-8")] == []


def test_a_report_may_load_and_run_nothing() -> None:
    page = (Path(workspace.__file__).parent / "reporting" / "report.html.j2").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
