"""``stepladder pack`` on a real run: what is in a package, and that it installs and answers without a network."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_run import stepladder

from stepladder import models
from stepladder.answering.standalone import ModelSettings
from stepladder.answering.team import PackedEnsemble
from stepladder.documents import Document
from stepladder.errors import GateError
from stepladder.packaging import selftest, wheels
from stepladder.packaging.build import SCRIPTS, PackageManifest
from stepladder.packaging.selftest import ExpectedAnswers
from stepladder.records import Prediction, Question

pytestmark = pytest.mark.dtype

SUM = shutil.which("sha256sum") or "sha256sum"
UNSHARED = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--net", "sh", "-c"]
"""A shell without any network but loopback."""


@pytest.fixture(scope="module")
def package(project: Path) -> Path:
    out = project / "package"
    usual = os.umask(0o077)  # whatever its maker hides from others
    try:
        done = stepladder(project, "pack", "tiny.toml", "package", "--engine", "vllm")
    finally:
        os.umask(usual)
    assert done.returncode == 0, done.stderr
    return out


def test_every_file_is_named_by_its_hash_and_nothing_by_the_clock(package: Path, project: Path) -> None:
    checked = subprocess.run([SUM, "--check", "--quiet", "SHA256SUMS"], cwd=package, check=False)
    assert checked.returncode == 0
    listed = {line.split("  ")[1] for line in (package / "SHA256SUMS").read_text().splitlines()}
    present = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert listed == present - {"SHA256SUMS"}
    for name in ("manifest.json", "sbom/package.cdx.json", "ensemble.json"):
        text = (package / name).read_text()
        assert not re.search(r"\b20\d\d-\d\d-\d\d", text)
        assert str(project) not in text


@pytest.mark.parametrize("document", [PackedEnsemble, PackageManifest, ExpectedAnswers, ModelSettings])
def test_a_document_is_read_as_it_was_written(package: Path, document: type[Document]) -> None:
    paths = [*package.rglob(document.FILE)]
    assert paths
    for path in paths:
        assert document.read(path.parent).to_json() == path.read_text(encoding="utf-8")


def test_it_holds_what_the_run_chose(package: Path, project: Path) -> None:
    choice = json.loads((project / "runs/tiny/ensemble/choice.json").read_text())
    names = [choice["leader"]] if choice["rule"] == "single" else choice["members"]
    assert {path.name for path in (package / "model").iterdir()} == {*names}
    for name in names:
        packed, made = (
            (folder / name / "model.safetensors") for folder in (package / "model", project / "runs/tiny/quantised")
        )
        assert packed.read_bytes() == made.read_bytes()
    bill = json.loads((package / "sbom" / "package.cdx.json").read_text())
    assert {part["name"] for part in bill["components"] if part["type"] == "machine-learning-model"} == {*names}
    called = {part["name"].lower() for part in bill["components"]}
    assert {"transformers", "openai", "stepladder", "clingo"} <= called
    assert "torch" not in called, "vLLM's environment computes"
    assert (
        package
        / "licenses"
        / f"stepladder-{json.loads((package / 'manifest.json').read_text())['made_by'].split()[1]}"
        / "LICENSE"
    ).is_file()


def test_another_user_can_run_it(package: Path) -> None:
    for path in (package, *package.rglob("*")):
        wanted = 0o055 if path.is_dir() else 0o044
        assert path.stat().st_mode & wanted == wanted, path


def test_the_image_has_a_layer_a_shard_and_the_prompts_last(package: Path) -> None:
    steps = (package / "Dockerfile").read_text().splitlines()
    full = steps[steps.index("FROM runtime AS full") :]
    copied = [line for line in full if line.startswith("COPY")]
    shards = [line for line in copied if ".safetensors" in line]
    assert all(line.count(".safetensors ") == 1 for line in shards)
    assert copied[-1] == "COPY prompts/ prompts/"
    assert copied[: len(shards)] == shards or len({*copied}) > 2
    assert "ARG IMAGE" in steps, "no base was named, so none is guessed"
    for source in {word for line in steps if line.startswith("COPY") for word in line.split()[1:-1]}:
        assert (package / source).exists(), source


def test_linters_have_nothing_to_say(package: Path) -> None:
    for words in (["hadolint", "Dockerfile"], ["shellcheck", *SCRIPTS]):
        linter = Path(sys.prefix) / "bin" / words[0]
        done = subprocess.run([linter, *words[1:]], cwd=package, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_it_installs_without_a_network(package: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    run = f"{package}/install.sh {environment} && {environment}/bin/python -m stepladder predict --help"
    done = subprocess.run(
        [*UNSHARED, run], env={"PATH": os.environ["PATH"], "PYTHON": sys.executable}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout


def test_it_answers_as_the_run_did(package: Path, tmp_path: Path) -> None:
    """With this environment's PyTorch, from another folder, without a network, HOME empty, and whatever the caller's
    PYTHONPATH holds."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(package, moved)
    where = {"PATH": os.environ["PATH"], "STEPLADDER_ENV": sys.prefix, "ENGINE": "local", "HOME": ""}
    where |= {name: os.environ[name] for name in (models.DTYPE_VARIABLE, "OMP_NUM_THREADS") if name in os.environ}
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "stepladder.py").write_text("raise SystemExit('not this one')")
    where["PYTHONPATH"] = str(tmp_path / "alien")
    (tmp_path / "out").mkdir()
    command = [*UNSHARED, f"{moved}/selftest.sh {tmp_path}/out"]
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert "answers as when it was packed, on this machine" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "selftest.answers.jsonl",
        "selftest.answers.jsonl.ledger.sqlite",
    }


def test_the_self_test_knows_the_machine_that_packed(package: Path, tmp_path: Path) -> None:
    expected = json.loads((package / "selftest.expected.json").read_text())
    problems = [json.loads(line) for line in (package / "selftest.jsonl").read_text().splitlines()]
    questions = [
        Question.model_validate(
            {"id": f"{row['id']}#{n}", "problem_id": row["id"], "problem": row["problem"], "language": "en"}
            | asked | {"source": "s"}
        )
        for row in problems for n, asked in enumerate(row["questions"])
    ]  # fmt: skip
    given = [
        Prediction(question_id=q.id, member="model", votes=(), answer=expected["letters"][q.id], texts=())
        for q in questions
    ]

    def check(machine: dict[str, str] | None) -> str:
        return selftest.check(package / "selftest.expected.json", machine, given, questions)

    other = expected["machine"] | {"dtype": "float16"}
    assert "as when it was packed, on this machine" in check(expected["machine"])
    assert "here in float16" in check(other)
    assert "here on a server" in check(None)
    wrong = "ABCDEFGH"[("ABCDEFGH".index(str(given[0].answer)) + 1) % len(questions[0].options)]
    given[0] = given[0].model_copy(update={"answer": wrong})
    with pytest.raises(GateError, match=f"1 of .* on this very machine, {re.escape(questions[0].id)} first"):
        check(expected["machine"])
    for at, said in enumerate(given):
        given[at] = said.model_copy(update={"answer": None})
    with pytest.raises(GateError, match=r"0 of .* less than 90%"):
        check(other)


def test_what_goes_wrong_is_one_line(package: Path, project: Path, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = stepladder(project, "pack", *words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "is there already" in said("tiny.toml", "package")
    assert "has no digest" in said("tiny.toml", "other", "--image", "vllm/vllm-openai:latest")
    (project / "stale.toml").write_text((project / "tiny.toml").read_text().replace("max_tokens = 8", "max_tokens = 9"))
    assert "'stepladder run stale.toml' brings it up to date" in said("stale.toml", "other")
    assert not (project / "other").exists()
    run = subprocess.run([package / "run.sh", "/nowhere", tmp_path / "a"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)


def test_wheels_are_what_is_installed_here() -> None:
    own = importlib.metadata.requires("stepladder") or []
    versions = wheels.needed(own, "serve", "3.12")
    assert versions["transformers"] == "5.17.0"
    assert "torch" not in versions
    assert wheels.needed(own, "local", "3.11")["torch"] == importlib.metadata.version("torch")


def test_what_stepladder_needs_is_read_from_its_wheel_not_from_how_it_was_installed(tmp_path: Path) -> None:
    wheel = tmp_path / "stepladder-0.1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.4", "Name: stepladder", "Version: 0.1.0", "Requires-Dist: filelock>=3"]
    lines.append('Requires-Dist: packaging>=25; extra == "local"')
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("stepladder-0.1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    own = wheels.requirements_of(wheel)
    assert wheels.needed(own, "serve", "3.12") == {"filelock": importlib.metadata.version("filelock")}
    assert wheels.needed(own, "local", "3.12").keys() == {"filelock", "packaging"}
