"""Files by a path, a pattern or an address; what is compressed or elsewhere is copied whole, or not at all."""

from __future__ import annotations

import gzip
import json
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_shards
import zstandard
from test_questions import Stage, stage

from stepladder import cli, files
from stepladder.errors import UserError

__all__ = ["stage"]  # a fixture
PACKED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def in_parts(stage: Stage, pattern: str, write: Callable[[str, bytes], object]) -> None:
    """Write the files of a run with ``pattern`` for its training problems, which are written by ``write``: compressed,
    and in two parts that their order puts together."""
    rows = test_shards.files(random.Random(1))
    stage.write(**rows)
    train = rows["train"]
    write("part-0.jsonl.zst", zstandard.compress(lines(train[:20])) + zstandard.compress(lines(train[20:30])))
    write("part-1.jsonl.gz", gzip.compress(lines(train[30:])))
    toml = Path("run.toml")
    toml.write_text(toml.read_text().replace('"train.jsonl"', f'"{pattern}"'))


def test_the_parts_of_a_file_are_the_file(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = test_shards.files(random.Random(1))
    for row in rows["train"]:
        row["source"] = "here"  # by default the file's name
    monkeypatch.setattr(test_shards, "files", lambda dice: rows)
    stage.write(**rows)
    assert stage.run() == 0
    whole = test_shards.made(stage)
    Path("[parts]").mkdir()
    in_parts(stage, "[[]parts]/part-*", lambda name, data: Path("[parts]", name).write_bytes(data))
    assert stage.run() == 0
    parts = test_shards.made(stage)
    assert {name: parts[name] == whole[name] for name in parts if name != "audit.json"} == {
        "train.jsonl": True, "validation.jsonl": True, "test.jsonl": True,
    }  # fmt: skip
    audit = stage.audit()
    assert audit["counts"] == json.loads(whole["audit.json"])["counts"]
    assert {finding["file"] for finding in audit["findings"]} == {"part-0.jsonl", "part-1.jsonl"}


def test_an_id_of_another_part_is_refused(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    rows = test_shards.files(random.Random(1))["train"]
    in_parts(stage, "part-*", lambda name, data: Path(name).write_bytes(data))
    Path("part-2.jsonl").write_bytes(lines(rows[3:4]))
    assert stage.run() == 2
    said = capsys.readouterr().err
    assert "part-2.jsonl:1: field 'id': id 'p3' was used in part-0.jsonl; ids must be unique" in said


@pytest.mark.parametrize("suffix", PACKED)
def test_what_is_compressed_is_read_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    text = b"".join(b"%d\n" % n for n in range(100_000))
    file, folder = tmp_path / f"rows.jsonl.{suffix}", tmp_path / "copies"
    folder.mkdir()
    whole = PACKED[suffix](text[:300_000]) + PACKED[suffix](text[300_000:])
    for data, problem in (
        (whole[:-9], "ends before its data does"),
        (whole[:50] + b"????" * 9 + whole[90:], "cannot be decompressed"),
        (b"not compressed", "cannot be decompressed"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=problem):
            files.fetched(str(file), folder)
        assert not (folder / "rows.jsonl").exists()
    file.write_bytes(whole)
    (copy,) = files.fetched(str(file), folder)
    assert copy.read_bytes() == text
    file.unlink()
    file.write_bytes(b"")
    assert files.fetched(str(file), folder) == [copy]  # which is there


def test_a_file_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.zst"
    file.write_bytes(zstandard.compress(b"\0" * 500_000_000))
    with pytest.raises(UserError, match="becomes more than 1,000 times as large"):
        files.fetched(str(file), tmp_path)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("part-*.jsonl", "part-.*: no file matches; check the pattern"),
        ("ftp://host/train.jsonl", "its protocol is not known; use one of s3, gs, abfs, hdfs, https, or a path"),
        ("s3://bucket/x::file:///etc/passwd", "holds '::'"),
        ("s3://key:secret@bucket/train.jsonl", r"^s3://\*\*\*: holds a user name or password"),
        ("https://127.0.0.1:9/train.jsonl", "^https://127.0.0.1:9/train.jsonl: cannot be read"),
        ("gs://bucket/train.jsonl", "^gs://bucket/train.jsonl: cannot be read: .*gcsfs"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_line(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        files.version(files.beside(tmp_path, name))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.jsonl").touch()
    with pytest.raises(UserError, match=r"two files are called part.jsonl; give them names of their own"):
        files.fetched(str(tmp_path / "*" / "part.jsonl"), tmp_path)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket called ``bucket`` of an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    boto3 = pytest.importorskip("boto3")
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "paid-for")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # its state is the process's
    store = boto3.client("s3")
    store.create_bucket(Bucket="bucket")
    yield store
    server.stop()


@pytest.mark.cluster
def test_questions_are_read_from_an_object_store(bucket: Any, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def put(name: str, data: bytes) -> None:
        bucket.put_object(Bucket="bucket", Key=name, Body=data)

    in_parts(stage, "part-*", lambda name, data: Path(name).write_bytes(data))
    assert stage.run() == 0
    local = test_shards.made(stage)
    in_parts(stage, "s3://bucket/part-*", put)
    assert stage.run() == 0
    assert test_shards.made(stage) == local
    capsys.readouterr()
    assert stage.run() == 0
    assert "up to date" in capsys.readouterr().out
    put("part-2.jsonl", lines([{"id": "p3"}]))
    assert stage.run() == 2
    assert "part-2.jsonl:1: field 'problem': is missing" in capsys.readouterr().err
    assert not any("paid-for" in file.read_text(errors="replace") for file in Path("runs").rglob("*") if file.is_file())


@pytest.mark.cluster
def test_what_is_written_to_an_object_store_is_whole(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="stop"), files.written("s3://bucket/a/answers.jsonl") as local:
        local.write_text("half")
        raise UserError("stop")
    with files.written("s3://bucket/a/answers.jsonl") as local:
        assert local == files.OUTBOX / "answers.jsonl"
        local.write_text("whole")
    with files.written("s3://bucket/package") as local:
        (local / "weights").mkdir(parents=True)
        (local / "weights" / "model").write_text("model")
    found = {entry["Key"]: entry["Size"] for entry in bucket.list_objects(Bucket="bucket")["Contents"]}
    assert found == {"a/answers.jsonl": 5, "package/weights/model": 5}
    with pytest.raises(UserError, match="s3://other/x: cannot be written"), files.written("s3://other/x") as local:
        local.write_text("lost?")
    assert (files.OUTBOX / "x").read_text() == "lost?"


@pytest.mark.cluster
def test_a_command_reads_and_writes_addresses(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"question": "Who?", "options": ["Ann", "Bob"], "answer": "B"}
    bucket.put_object(Bucket="bucket", Key="rows.jsonl.gz", Body=gzip.compress(json.dumps(row).encode()))
    words = ["stepladder", "import", "s3://bucket/rows.jsonl.gz", "s3://bucket/train.jsonl"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out == (
        "Wrote stepladder-outbox/train.jsonl: 1 question\n"
        "Copied stepladder-outbox/train.jsonl to s3://bucket/train.jsonl\n"
    )
    written = bucket.get_object(Bucket="bucket", Key="train.jsonl")["Body"].read()
    assert json.loads(written)["questions"] == [row]
