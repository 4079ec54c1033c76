"""Models and data files by their id: the real client libraries, in processes of their own, against a small hub here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from local_hub import NEW, Repos, Server, parquet

pytest.importorskip("huggingface_hub")

ENVIRONMENT = Path(__file__).parents[1] / ".venv-swift"
OLD = "0" * 39 + "1"
WEIGHTS = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer.model": "words",
    "chat_template.jinja": "{{ messages }}",
    "model.safetensors": "numbers",
    "README.md": "# A student",
    "LICENSE.txt": "Apache-2.0",
}
OTHERS = {
    "pytorch_model.bin": "a pickle",
    "model.pt": "a pickle",
    "modeling_student.py": "raise SystemExit",
    "tokenizer.py": "raise SystemExit",
    "onnx/model.safetensors": "numbers",
    "onnx/config.json": "{}",
}
ALPACA_ZH = [{"instruction": f"用一句话解释第{n}号规则", "input": "", "output": f"答案{n}。"} for n in range(9)]
ALPACA_EN = [
    {"instruction": f"Explain rule {n}", "input": "", "output": f"Answer {n}.", "text": f"### Instruction: rule {n}"}
    for n in range(9)
]
SHARED = [
    {"id": "empty", "conversations": []},
    *(
        {
            "id": f"talk_{n}",
            "conversations": [
                {"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": f"Reply {n}."},
                {"from": "human", "value": "And then?"},
            ],
        }
        for n in range(9)
    ),
]  # fmt: skip


DATA: dict[str, dict[str, str | bytes]] = {
    "alpaca-zh": {"alpaca_zh.json": json.dumps(ALPACA_ZH, ensure_ascii=False, indent=1)},
    "alpaca-en": {"data/train-00000.parquet": parquet(ALPACA_EN)},
    "shared": {"talks.json": json.dumps(SHARED), "talks.jsonl": "".join(json.dumps(row) + "\n" for row in SHARED)},
}
"""The winning entry's calibration mix, in the forms that its sets have on the hubs."""
REPOS: Repos = {
    ("school/student", OLD): WEIGHTS | OTHERS | {"config.json": '{"old": true}'},
    ("school/student", NEW): WEIGHTS | OTHERS,
    ("school/gated", NEW): WEIGHTS,
    ("school/pickled", NEW): {"config.json": "{}", "pytorch_model.bin": "a pickle"},
    **{
        (f"data/{name}", NEW): files | {"script.py": "raise SystemExit", "other.json": "[]"}
        for name, files in DATA.items()
    },
}


@pytest.fixture
def hub() -> Iterator[Server]:
    with Server(REPOS) as server:
        yield server


class Desk(NamedTuple):
    """A folder to work in, a cache, and a hub to ask."""

    folder: Path
    endpoint: str

    def run(
        self, code: str, settings: Mapping[str, str], python: str = sys.executable
    ) -> subprocess.CompletedProcess[str]:
        """Python code with no more set than a user would have."""
        ours = ("HF_", "TRANSFORMERS_", "MODELSCOPE_", "TQDM_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_CACHE": str(self.folder / "cache"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
        }
        return subprocess.run(
            [python, "-c", code],
            cwd=self.folder, env=environment | dict(settings), capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def locate(self, name: str, before: str = "", **settings: str) -> tuple[str, str]:
        """Where a model is, or else the one line that says why it is not there; and what was shown meanwhile."""
        done = self.run(
            f"{before}\nfrom stepladder import errors, models\n"
            f"try:\n    print(models.locate({name!r}))\n"
            "except errors.UserError as error:\n    print(type(error).__name__, error)\n",
            settings,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return done.stdout.strip(), done.stderr

    def find_data(self, name: str, file: str, settings: Mapping[str, str], python: str = sys.executable) -> str:
        """Where a data file is, or else the one line that says why it is not there."""
        code = f"""
from stepladder import errors
from stepladder.models import fetching
try:
    print(fetching.find_data({name!r}, {file!r}))
except errors.UserError as error:
    print(error)
"""
        done = self.run(code, settings, python)
        assert done.stdout.count("\n") == 1, done.stderr
        return done.stdout.strip()


@pytest.fixture
def desk(hub: Server, tmp_path: Path) -> Desk:
    return Desk(tmp_path, hub.url)


def test_a_model_is_downloaded_once_and_then_found_offline(desk: Desk, hub: Server) -> None:
    # 'require' takes this process off the net and switches progress bars off: of the download neither is true.
    place, shown = desk.locate("school/student", "from stepladder import models\nmodels.require()")
    assert Path(place) == desk.folder / "cache" / "models--school--student" / "snapshots" / NEW
    assert {path.name: path.read_text() for path in Path(place).iterdir()} == WEIGHTS
    assert "downloading school/student from Hugging Face" in shown
    assert not [asked for asked in hub.asked if asked.endswith((".bin", ".pt", ".py")) or "/onnx/" in asked]
    hub.asked.clear()
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert desk.locate("school/student", **settings) == (place, "")
    assert hub.asked == []


def test_a_pinned_revision_is_that_revision(desk: Desk, hub: Server) -> None:
    place, _ = desk.locate(f"school/student@{OLD}")
    assert Path(place).name == OLD
    assert (Path(place) / "config.json").read_text() == '{"old": true}'
    assert desk.locate(f"school/student@{OLD}", HF_HUB_OFFLINE="1") == (place, "")
    assert "not downloaded (HF_HUB_OFFLINE=1)" in desk.locate(f"school/student@{NEW}", HF_HUB_OFFLINE="1")[0]


def test_what_is_missing_of_a_download_that_was_killed_is_fetched(desk: Desk, hub: Server) -> None:
    place = Path(desk.locate("school/student")[0])
    for name in ("tokenizer.model", "model.safetensors"):
        (place / name).resolve().unlink()
        (place / name).unlink()
    hub.asked.clear()
    assert "(or not whole)" in desk.locate("school/student", HF_HUB_OFFLINE="1")[0]
    assert desk.locate("school/student")[0] == str(place)
    fetched = {asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /school")}
    assert fetched == {"tokenizer.model", "model.safetensors"}


@pytest.mark.parametrize(
    ("name", "settings", "reason", "command"),
    [
        ("school/nobody", {}, "404 Client Error.", "hf download school/nobody"),
        ("school/student@v9", {}, "Revision Not Found", "hf download school/student --revision v9"),
        ("school/gated", {}, "Cannot access gated repo", "hf download school/gated"),
        ("school/student", {"HF_HUB_OFFLINE": "1"}, "(HF_HUB_OFFLINE=1)", "hf download school/student"),
        ("school/student", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused", "hf download school/student"),
    ],
    ids=["unknown", "unknown revision", "gated", "offline", "no network"],
)
def test_one_line_says_why_a_model_is_not_there(
    name: str, settings: dict[str, str], reason: str, command: str, desk: Desk, hub: Server
) -> None:
    said, shown = desk.locate(name, **settings)
    assert said.startswith(f"ModelError model '{name}': ")
    assert reason in said
    assert said.endswith(f"run '{command}' on a machine with internet, or give a folder")
    assert "Traceback" not in shown
    assert not [asked for asked in hub.asked if settings]


def test_a_model_in_another_format_is_told_by_its_files(desk: Desk) -> None:
    said, _ = desk.locate("school/pickled")
    assert said.startswith("ModelError model 'school/pickled': no *.safetensors in ")


def test_without_its_library_modelscope_cannot_be_asked(desk: Desk) -> None:
    without = "import sys\nsys.modules['modelscope'] = None"
    said, _ = desk.locate("modelscope:school/student", without)
    assert said == "MissingExtra modelscope is not installed: pip install modelscope (or run 'make setup')"


@pytest.mark.parametrize("name", ["school/student", "modelscope:school/student", f"school/student@{OLD}"])
def test_a_folder_of_that_name_goes_first(name: str, desk: Desk, hub: Server) -> None:
    folder = desk.folder / name
    folder.mkdir(parents=True)
    assert desk.locate(name)[0].startswith(f"ModelError model '{name}': no config.json in {name}; ")
    for file, text in WEIGHTS.items():
        (folder / file).write_text(text)
    assert desk.locate(name) == (name, "")
    assert hub.asked == []


def test_what_is_no_id_is_a_folder_that_is_not_there(desk: Desk, hub: Server) -> None:
    names = [
        "student",
        "./school/student",
        "a/b/c",
        "../student",
        "school/..",
        "~/student",
        "modelscope:student",
        "a/b@",
    ]
    code = f"""
from stepladder import errors, models
for name in {names}:
    try:
        models.locate(name)
    except errors.ModelError as error:
        print(error)
"""
    said = desk.run(code, {}).stdout.splitlines()
    assert len(said) == len(names)
    assert all("; give a Hugging Face model folder or 'bundled'" in line for line in said)
    assert hub.asked == []


def calibrate(base: Path) -> str:
    """Code that calibrates on the entry's mix and prints the texts, as the stage does: in a process that is offline."""
    mix = [
        ("data/alpaca-zh", "alpaca_zh.json"),
        ("data/alpaca-en", "data/train-00000.parquet"),
        (f"data/shared@{NEW}", "talks.json"),
    ]
    return f"""
import json, random
from pathlib import Path
from stepladder import errors, models
from stepladder.config import General
from stepladder.quantising import calibration
tokenizer = models.load_tokenizer(Path({str(base)!r}))
try:
    for source, file in {mix!r}:
        corpus = General(source=source, file=file, samples=3)
        print(json.dumps([tokenizer.decode(ids) for ids in calibration.general(tokenizer, corpus, random.Random(1))]))
except errors.UserError as error:
    print(error)
"""


def test_the_calibration_mix_is_downloaded_once_and_then_needs_no_hub(base: Path, desk: Desk, hub: Server) -> None:
    done = desk.run(calibrate(base), {})
    assert done.returncode == 0, done.stderr
    chinese, english, talks = map(json.loads, done.stdout.splitlines())
    for texts, said in ((chinese, "用一句话解释第"), (english, "Explain rule"), (talks, "Question")):
        assert len(texts) == 3
        assert all("<|im_start|>user\n" + said in text and text.endswith("<|im_end|>") for text in texts)
    assert "### Instruction" not in str(english)  # the conversation, and not the same again as one raw text
    assert "downloading alpaca_zh.json of data/alpaca-zh from Hugging Face" in done.stderr
    fetched = {asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /datasets")}
    assert fetched == {"alpaca_zh.json", "train-00000.parquet", "talks.json"}
    hub.asked.clear()
    again = desk.run(calibrate(base), {})
    assert again.stdout == done.stdout
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "file", "settings", "reason"),
    [
        ("data/nobody", "a.json", {}, "404 Client Error."),
        ("data/shared", "none.json", {}, "it has no file 'none.json'"),
        ("data/shared", "talks.json", {"HF_HUB_OFFLINE": "1"}, "(HF_HUB_OFFLINE=1)"),
        ("data/shared", "talks.json", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
    ],
    ids=["unknown", "no such file", "offline", "no network"],
)
def test_one_line_says_why_a_data_file_is_not_there(
    name: str, file: str, settings: dict[str, str], reason: str, desk: Desk
) -> None:
    said = desk.find_data(name, file, settings)
    assert said.startswith(f"dataset '{name}': '{file}' is not in the cache of Hugging Face, and not downloaded (")
    assert reason in said
    command = f"hf download --repo-type dataset {name} {file}"
    assert said.endswith(f"run '{command}' on a machine with internet, or give a file as 'source'")


def test_a_data_file_beyond_its_bound_is_not_downloaded(desk: Desk) -> None:
    """Whatever the hub says of its size; the bound is lowered here."""
    code = """
import sys
from stepladder.models import download
download.MAX_DATA_BYTES = 500
sys.argv = ["download", "data/shared", "talks.json"]
sys.exit(download.main())
"""
    done = desk.run(code, {"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 1
    assert "File too large" in done.stdout
    assert "is not in the cache" in desk.find_data("data/shared", "talks.json", {"HF_HUB_OFFLINE": "1"})


@pytest.mark.swift
def test_modelscope_gives_data_files_too(desk: Desk, hub: Server) -> None:
    settings = {"MODELSCOPE_CACHE": str(desk.folder / "cache"), "MODELSCOPE_HOME": str(desk.folder / "home")}
    settings |= {"MODELSCOPE_ENDPOINT": desk.endpoint}
    python = str(ENVIRONMENT / "bin" / "python")
    place = desk.find_data(f"modelscope:data/shared@{NEW}", "talks.jsonl", settings, python)
    assert Path(place).read_text() == DATA["shared"]["talks.jsonl"]
    hub.asked.clear()
    assert desk.find_data(f"modelscope:data/shared@{NEW}", "talks.jsonl", settings, python) == place
    assert hub.asked == []
    said = desk.find_data(f"modelscope:data/shared@{NEW}", "none.json", settings, python)
    assert f"run 'modelscope download --dataset data/shared none.json --revision {NEW}'" in said


@pytest.mark.swift
def test_modelscope_is_asked_through_its_own_library(desk: Desk, hub: Server) -> None:
    def find(name: str, offline: str) -> str:
        code = f"""
from stepladder import errors
from stepladder.models import fetching
try:
    print(fetching.find({name!r}))
except errors.ModelError as error:
    print(error)
"""
        settings = {"MODELSCOPE_CACHE": str(desk.folder / "cache"), "MODELSCOPE_HOME": str(desk.folder / "home")}
        settings |= {"MODELSCOPE_ENDPOINT": desk.endpoint, "HF_HUB_OFFLINE": offline}
        return desk.run(code, settings, str(ENVIRONMENT / "bin" / "python")).stdout.strip()

    command = "run 'modelscope download --model school/nobody --revision v1' on a machine with internet"
    for offline, reason in (("0", "[404] HTTP 404"), ("1", "(HF_HUB_OFFLINE=1)")):
        said = find("modelscope:school/nobody@v1", offline)
        assert reason in said
        assert command in said
    place = find(f"modelscope:school/student@{OLD}", "0")
    assert Path(place) == desk.folder / "cache" / "models" / "school--student" / "snapshots" / OLD
    files = {path.name: path.read_text() for path in Path(place).iterdir() if path.is_file()}
    assert {name: text for name, text in files.items() if not name.startswith(".")} == WEIGHTS | {
        "config.json": '{"old": true}'
    }
    hub.asked.clear()
    assert find(f"modelscope:school/student@{OLD}", "1") == place
    assert "HF_HUB_OFFLINE=1" in find(f"modelscope:school/student@{NEW}", "1")
    assert hub.asked == []
