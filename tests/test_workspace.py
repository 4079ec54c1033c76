"""Artifacts: whole or not there, fresh or stale."""

from __future__ import annotations

import fcntl
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stepladder import models
from stepladder.errors import UserError
from stepladder.workspace import Artifact, Workspace


def artifact(folder: Path, setting: int = 1, digest: str = "d") -> Artifact:
    return Artifact(folder, {"setting": setting}, {"input": digest})


def make(one: Artifact, text: str = "hello") -> None:
    with one.writing() as folder:
        (folder / "file.txt").write_text(text)


def test_an_artifact_is_done_until_what_it_was_made_from_changes(tmp_path: Path) -> None:
    one = artifact(tmp_path / "one")
    assert one.state() == "missing"
    make(one)
    assert one.state() == "done"
    assert artifact(tmp_path / "one", setting=2).state() == "stale"
    assert artifact(tmp_path / "one", digest="e").state() == "stale"


def test_a_killed_build_goes_on_only_from_what_is_the_same(tmp_path: Path) -> None:
    one = artifact(tmp_path / "one")
    (one.scratch("float32") / "checkpoint").touch()
    assert (one.scratch("float32") / "checkpoint").exists()
    assert not (one.scratch("bfloat16") / "checkpoint").exists()
    (one.scratch("bfloat16") / "checkpoint").touch()
    assert not (artifact(tmp_path / "one", setting=2).scratch("bfloat16") / "checkpoint").exists()
    make(one)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_failed_build_leaves_the_old_artifact_alone(tmp_path: Path) -> None:
    one = artifact(tmp_path / "one")
    make(one, "old")
    with pytest.raises(ZeroDivisionError), artifact(tmp_path / "one", setting=2).writing() as folder:
        (folder / "file.txt").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "one" / "file.txt").read_text() == "old"
    assert one.state() == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_without_its_manifest_or_with_a_file_cut_short_is_not_there(tmp_path: Path) -> None:
    one = artifact(tmp_path / "one")
    make(one)
    (tmp_path / "one" / "file.txt").write_text("hell")
    assert one.state() == "missing"
    make(one)
    (tmp_path / "one" / "manifest.json").unlink()
    assert one.state() == "missing"
    with pytest.raises(UserError, match="run the stages before"):
        one.digest()


def test_the_digest_is_of_the_files_and_not_of_how_long_they_took(tmp_path: Path) -> None:
    one, other = artifact(tmp_path / "one"), artifact(tmp_path / "other", setting=2)
    make(one)
    make(other)
    assert one.digest() == other.digest()
    make(one, "changed")
    assert one.digest() != other.digest()


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "run")
    with workspace.locked(), pytest.raises(UserError, match="another stepladder"), workspace.locked():
        pass


def test_who_looks_whether_a_run_is_locked_does_not_keep_it_from_being_locked(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "run")
    with workspace.locked():
        pass
    with (workspace.folder / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as is_held does, for an instant
        unlock = threading.Timer(0.02, fcntl.flock, (file, fcntl.LOCK_UN))
        unlock.start()
        with workspace.locked():
            pass
        unlock.join()


def test_digests_are_remembered_by_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = [tmp_path / str(number) for number in range(16)]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    with ThreadPoolExecutor(16) as pool:
        digests = [*pool.map(models.content_digest, folders)]
    assert len(set(digests)) == 16
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders[0] / "config.json"))  # where nothing can be written
    assert models.content_digest(folders[0]) == digests[0]
    kept = json.loads((tmp_path / "cache" / "stepladder" / models.DIGESTS_FILE).read_text())
    assert {*kept} == {str(folder / "config.json") for folder in folders}
