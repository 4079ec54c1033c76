"""The ledger's file when it is full, locked, read-only, damaged, emptied or another program's."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from api_server import ApiServer
from asker import model, request, requests, rows, sums_agree

from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope, faults, health, opening, packing, patience
from stepladder.ask.ledger.commit import Committer
from stepladder.ask.ledger.schema import APPLICATION_ID, MIGRATIONS
from stepladder.ask.remote.engine import ask_all
from stepladder.ask.remote.stopping import Stop
from stepladder.ask.remote.teacher import priced_model
from stepladder.ask.request import Response
from stepladder.errors import AskError, LedgerError

SCOPE = Scope("run")
ANSWER = Response(text="A", max_tokens=16, prompt_tokens=1, completion_tokens=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(faults, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(opening, "EMPTY_WAIT_SECONDS", 0.1)


@pytest.fixture
def limit() -> Iterator[object]:
    """Sets the largest size of a file that this process may write, and lifts it afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest(path: Path) -> int:
    return max(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def test_what_was_answered_waits_in_memory_until_there_is_room(
    api: ApiServer, tmp_path: Path, limit: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger may not grow while answers arrive: nothing is sent any more, and all of them are kept once it may."""
    assert callable(limit)
    api.set_script({"latency_s": 0.3})
    monkeypatch.setattr(patience, "MIN_ROOM_BYTES", 0)
    path = tmp_path / "ledger.sqlite"
    notes: list[str] = []
    billed = []

    def interfere() -> None:
        while not api.billing()["in_flight"]:
            time.sleep(0.01)
        limit(largest(path))
        while not notes:
            time.sleep(0.01)
        time.sleep(0.5)
        billed.append(api.settled()["billed"])
        limit(None)

    with Ledger(path) as ledger:
        thread = threading.Thread(target=interfere)
        thread.start()
        served = priced_model(RemoteModel("test-model", model(api.url, 20)))
        before = api.settled()["billed"]
        tally = asyncio.run(ask_all(requests("full", 60), served, ledger, SCOPE, Listener(note=notes.append)))
        thread.join()
        assert tally.answered == len(ledger.find_all(requests("full", 60))) == 60
        assert ledger.unsettled("run") == []
        assert len(rows(ledger, "SELECT id FROM attempts")) == 60
    assert api.settled()["billed"] - before == 60
    assert billed[0] - before <= 20
    assert len(notes) == 2
    assert "what is stored is intact" in notes[0]
    assert "answers wait in memory, up to 10 min" in notes[0]
    assert "going on" in notes[1]


def test_nothing_is_begun_on_a_disk_that_is_nearly_full(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "room_bytes", lambda path: 1000)
    monkeypatch.setattr(patience, "WAIT_SECONDS", 0.2)
    api.set_script({})
    before = api.settled()["billed"]
    with (
        pytest.raises(LedgerError, match=r"the disk is nearly full .*free some space\. Given up"),
        Ledger(tmp_path / "ledger.sqlite") as ledger,
    ):
        asyncio.run(
            ask_all(requests("nearly", 5), priced_model(RemoteModel("test-model", model(api.url, 8))), ledger, SCOPE)
        )
    assert api.settled()["billed"] == before


def test_a_stop_does_not_wait_for_room(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "room_bytes", lambda path: 1000)
    api.set_script({})
    stop = Stop()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        served = priced_model(RemoteModel("test-model", model(api.url, 8)))
        listener = Listener(note=lambda line: stop.request())
        with pytest.raises(AskError, match="stopped before all requests were answered"):
            asyncio.run(ask_all(requests("stop", 5), served, ledger, SCOPE, listener, stop))
        assert ledger.calls("run") == 0


@pytest.mark.parametrize("lasting", [False, True])
def test_an_answer_that_no_task_waits_for_is_tried_once_more_at_the_end(
    tmp_path: Path, limit: object, lasting: bool
) -> None:
    assert callable(limit)
    path = tmp_path / "ledger.sqlite"

    async def write(ledger: Ledger) -> None:
        async with Committer(ledger, lambda line: limit(None) if not lasting else None) as committer:
            limit(largest(path))
            task = asyncio.create_task(committer.write(lambda ledger: ledger.keep("run", request("one"), ANSWER)))
            await asyncio.sleep(0.02)
            task.cancel()

    with Ledger(path) as ledger:
        ledger.begin_session()
        asyncio.run(write(ledger))
        limit(None)
        assert ledger.calls("run") == (0 if lasting else 1)


def test_a_worker_that_may_not_write_ends_with_one_line(api: ApiServer, tmp_path: Path, limit: object) -> None:
    assert callable(limit)
    api.set_script({})
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        limit(largest(path))
        with pytest.raises(LedgerError, match=r"ledger\.sqlite: cannot grow .*limit on a file's size is .* bytes"):
            ask_remote(requests("limit", 3), RemoteModel("test-model", model(api.url, 8)), ledger, SCOPE)
        limit(None)


def test_answers_of_weights_in_this_process_wait_for_room_too(tmp_path: Path, limit: object) -> None:
    assert callable(limit)
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        limit(largest(path))
        notes: list[str] = []
        threading.Timer(0.3, limit, [None]).start()
        ledger.store("run", [(one, ANSWER) for one in requests("many", 200)], notes.append)
        assert ledger.calls("run") == 200
    assert len(notes) == 2


def test_a_locked_ledger_is_not_to_be_moved(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as other, Ledger(path, read_only=True) as reader:
        other.begin()
        assert reader.calls("run") == 0
        with Ledger(path) as opened:  # opening does not wait for a lock
            pass
        with (
            pytest.raises(LedgerError, match=r"has kept it locked .*leave it where it is") as caught,
            Ledger(path) as opened,
        ):
            opened.begin()
        other.rollback()
    assert "move it away" not in str(caught.value)


def test_an_answer_waits_for_a_lock_longer_than_sqlite_does(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    notes: list[str] = []
    with Ledger(path) as other, Ledger(path) as opened:
        other.begin()
        timer = threading.Timer(0.4, other.rollback)
        timer.start()
        opened.store("run", [(request("late"), ANSWER)], notes.append)
        timer.join()
        assert opened.calls("run") == 1
    assert "another process has kept it locked" in notes[0]


CODES = {
    sqlite3.SQLITE_BUSY: "leave it where it is, and wait",
    sqlite3.SQLITE_BUSY_SNAPSHOT: "leave it where it is, and wait",
    sqlite3.SQLITE_READONLY: "leave it where it is and make it",
    sqlite3.SQLITE_READONLY_DBMOVED: "put it back where it was",
    sqlite3.SQLITE_CANTOPEN: "choose a folder you can write to",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR_WRITE: "check its space, quota and health",
    sqlite3.SQLITE_CORRUPT: "put a backup in its place",
    sqlite3.SQLITE_NOTADB: "move it away to start a new one",
}


@pytest.mark.parametrize("code", CODES)
def test_each_of_sqlite_s_errors_has_its_advice(code: int, tmp_path: Path) -> None:
    error = sqlite3.OperationalError("said SQLite")
    error.sqlite_errorcode = code
    explained = str(faults.explain(tmp_path / "ledger.sqlite", error))
    assert CODES[code] in explained
    assert "\n" not in explained
    assert ("move it away" in explained) == (code == sqlite3.SQLITE_NOTADB)
    assert faults.explain(tmp_path, sqlite3.IntegrityError("a bug")) is None


def test_a_network_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    assert faults.network_file_system(tmp_path / "ledger.sqlite") == "nfs4"
    assert faults.network_file_system(tmp_path.parent / "ledger.sqlite") is None
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    assert "network file system, nfs4" in str(faults.explain(tmp_path / "ledger.sqlite", error))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert "lies on a network file system (nfs4)" in ledger.check()[0]


# Reading only


def test_reading_changes_nothing_even_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.store("run", [(request("one"), ANSWER)])
    content = path.read_bytes()
    with Ledger(path, read_only=True) as ledger:
        assert ledger.calls("run") == 1
        with pytest.raises(sqlite3.OperationalError):
            ledger.begin_session()
    assert path.read_bytes() == content


def test_a_ledger_in_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.store("run", [(request("one"), ANSWER)])
    connect: Any = sqlite3.connect

    def no_shared_memory(name: str, **keywords: Any) -> sqlite3.Connection:
        opened: sqlite3.Connection = connect(tmp_path if "immutable" not in name else name, **keywords)
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", no_shared_memory)
        with Ledger(path, read_only=True) as ledger:
            assert ledger.calls("run") == 1
        path.with_name("ledger.sqlite-wal").write_bytes(b"somebody writes")
        with pytest.raises(LedgerError, match="cannot be opened"):
            Ledger(path, read_only=True)


def test_a_ledger_that_is_not_there_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "ledger.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []


# What is in the file


def old_ledger(path: Path, version: int) -> None:
    """A ledger as an older version wrote it."""
    with sqlite3.connect(path) as db:
        for migration in MIGRATIONS[:version]:
            db.executescript(migration)
        db.execute("INSERT INTO requests VALUES ('k', '{}')")
        db.execute("INSERT INTO responses (key, max_tokens, run, text, finished, prompt_tokens, completion_tokens,"
                   " micro_dollars) VALUES ('k', 16, 'run', 'A', 1, 1, 1, 0)")  # fmt: skip
        if version > 1:
            db.execute("INSERT INTO sessions (pid, started) VALUES (1, 0)")
            for _ in range(3):
                db.execute(
                    "INSERT INTO attempts (key, session, run, rung, model, max_tokens, reserved, started)"
                    " VALUES ('k', 1, 'run', 'easy', 'm', 16, 9, 0)"
                )
            db.executemany(
                "UPDATE attempts SET charged = ?, outcome = 'answered', seconds = ?, raw = ? WHERE id = ?",
                [(3, 0.5, b"{}", 1), (4, 0.7, b"{}", 2)],
            )
        db.execute(f"PRAGMA user_version = {version}")
    db.close()


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
@pytest.mark.parametrize("read_only", [False, True])
def test_ledgers_of_older_versions_are_read(tmp_path: Path, version: int, read_only: bool) -> None:
    path = tmp_path / "ledger.sqlite"
    old_ledger(path, version)
    with Ledger(path, read_only=read_only) as ledger:
        assert ledger.calls("run") == 1
        assert rows(ledger, "PRAGMA application_id") == [(APPLICATION_ID,)]
        assert rows(ledger, "SELECT text, checksum FROM responses") == [("A", "")]
        assert sums_agree(ledger)
        if version > 1:
            (account,) = ledger.accounts("run")
            assert account.outcomes == {"answered": 2, "open": 1}
            assert account.micro_dollars == ledger.spent("run") == ledger.spent("run", "easy") == 16
            assert [account.percentile(share) for share in (0.0, 0.5, 0.95)] == [0.5, 0.7, 0.7]
            assert [row["raw"] for row in ledger.export() if "raw" in row] == ["{}", "{}", None]


def test_an_old_ledger_is_made_smaller_and_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    old_ledger(path, 4)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE attempts SET raw = ? WHERE raw IS NOT NULL", (b'{"text": "A"}' * 10_000,))
        db.execute("UPDATE requests SET identity = ?", (json.dumps({"messages": ["?" * 100_000]}),))
        db.executemany(
            "INSERT INTO responses (key, max_tokens, run, text, finished, prompt_tokens, completion_tokens,"
            " micro_dollars) VALUES ('k', ?, 'run', ?, 1, 1, 1, 0)",
            [(number, "long " * 10_000) for number in range(17, 600)],
        )
    db.close()
    with Ledger(path) as ledger:
        before = [*ledger.export()]
        ledger.compact()
        assert [*ledger.export()] == before
        assert before[0]["raw"] == '{"text": "A"}' * 10_000
        assert sums_agree(ledger)
        assert rows(ledger, "SELECT COUNT(raw), COUNT(body) FROM attempts") == [(0, 2)]
        assert rows(ledger, "SELECT TYPEOF(text), COUNT(*) FROM responses GROUP BY 1") == [("blob", 583), ("text", 1)]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("pragma", ["application_id = 7", "user_version = 0", "user_version = 3"])
def test_another_program_s_file_is_left_alone(tmp_path: Path, pragma: str) -> None:
    path = tmp_path / "photos.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE photos (name TEXT)")
        db.execute(f"PRAGMA {pragma}")
    db.close()
    content = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(LedgerError, match="another program's SQLite file"):
            Ledger(path, read_only=read_only)
    assert path.read_bytes() == content


def test_an_emptied_ledger_is_not_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    with Ledger(tmp_path / "ledger.sqlite"):  # nothing is beside it
        pass
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    (tmp_path / "demo" / "samples").mkdir(parents=True)
    (tmp_path / "demo" / "samples" / "manifest.json").write_text("{}")
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=r"is empty \(0 bytes\).*put a backup in its place, or delete"):
            Ledger(tmp_path / "ledger.sqlite", read_only=read_only)


def test_a_ledger_whose_creation_was_killed_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "demo" / "questions").mkdir(parents=True)
    (tmp_path / "demo" / "questions" / "manifest.json").write_text("{}")
    (tmp_path / "ledger.sqlite").touch()
    with Ledger(tmp_path / "ledger.sqlite") as made:
        assert made.calls("demo") == 0


@pytest.mark.parametrize("changed", ["B", b"B", packing.packed(b"B"), packing.packed(b"\xff"), None])
def test_a_changed_answer_is_noticed(ledger: Ledger, changed: str | bytes | None) -> None:
    (wanted,) = requests("changed", 1)
    long = ANSWER.model_copy(update={"text": "A long answer. " * 50})
    ledger.store("run", [(wanted, long)])
    assert ledger.find(wanted) == long
    with sqlite3.connect(ledger.path) as db:
        ((stored,),) = db.execute("SELECT text FROM responses").fetchall()
        assert len(stored) < 100
        db.execute("UPDATE responses SET text = ?", (stored[:-1] if changed is None else changed,))
    db.close()
    with pytest.raises(LedgerError, match=r"damaged \(the answer to request .* is not what was stored\)"):
        ledger.find(wanted)


def test_a_damaged_ledger_is_noticed_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.store("run", [(one, ANSWER) for one in requests("many", 500)])
        assert ledger.check() == []
    content = bytearray(path.read_bytes())
    for page in range(4096 * 8, len(content), 4096):
        content[page : page + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with (
        pytest.raises(LedgerError, match=r"damaged .*; keep the file: put a backup in its place"),
        Ledger(path, read_only=True) as ledger,
    ):
        ledger.check()


def test_a_large_ledger_is_not_checked_and_says_so(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_CHECKED_BYTES", 10)
    assert "not checked for damage" in ledger.check()[0]


def test_a_backup_is_a_ledger(ledger: Ledger, tmp_path: Path) -> None:
    ledger.store("run", [(request("one"), ANSWER)])
    ledger.begin()  # it is in use
    with Ledger(ledger.path, read_only=True) as reader:
        reader.back_up(tmp_path / "copy.sqlite")
        with pytest.raises(LedgerError, match="is there already"):
            reader.back_up(tmp_path / "copy.sqlite")
        with pytest.raises(LedgerError, match="cannot be written"):
            reader.back_up(tmp_path / "none" / "copy.sqlite")
    ledger.rollback()
    assert (tmp_path / "copy.sqlite").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob(".*partial*")) == []
    shutil.copy(tmp_path / "copy.sqlite", tmp_path / "restored.sqlite")
    with Ledger(tmp_path / "restored.sqlite") as restored:
        assert restored.find(request("one")) == ANSWER.model_copy()


def test_a_session_s_file_is_never_what_a_link_leads_to(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    ledger._session_file(1).symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic"):
        ledger.begin_session()
    assert not (tmp_path / "new").exists()
