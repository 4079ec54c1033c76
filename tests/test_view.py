"""The pages of a run, over real HTTP: who may see them, what hostile texts do there, and that no decision is lost."""

from __future__ import annotations

import contextlib
import html
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

import pytest
from test_questions import line, problem

from stepladder import cli
from stepladder.context import Context
from stepladder.mcq.reviews import read_decisions
from stepladder.progress import Heartbeat
from stepladder.viewing import marks, words
from stepladder.viewing.index import Index

TOML = """
name = "run"
language = "en"
[questions]
train = "train.jsonl"
reviewed = "reviewed.jsonl"
[[rung]]
name = "mine"
kind = "chains"
chains = "chains.jsonl"
[[member]]
name = "a"
"""
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)></pre>\u202eafter\u200b [x](javascript:alert(3))"
IDS = [f"p{number}{'<b>&quot;' if number == 3 else ''}" for number in range(12)]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


class Browser:
    """What a browser sends, with its cookies."""

    def __init__(self, address: str) -> None:
        self.host, _, token = address.removeprefix("http://").partition("/?token=")
        self.cookies: dict[str, str] = {}
        self.enter = self.get(f"/?token={token}")

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, None, **headers)

    def post(self, path: str, **fields: str) -> Reply:
        return self.send("POST", path, urlencode(fields).encode(), Origin=f"http://{self.host}")

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        own = {"Host": self.host, "Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items())} | headers
        connection = http.client.HTTPConnection(self.host, timeout=20)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in own.items() if value})
        reply = connection.getresponse()
        text = reply.read().decode()
        for name, value in reply.getheaders():
            if name.lower() == "set-cookie":
                cookie, _, given = value.partition(";")[0].partition("=")
                self.cookies[cookie] = given
        connection.close()
        return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, text)


def decisions(folder: Path) -> list[tuple[str, str, str | None, str]]:
    return [(d.id, d.action, d.answer, d.reviewer) for d in read_decisions(folder / "reviewed.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with six labels that three models contradict, of twelve."""
    folder = tmp_path_factory.mktemp("view")
    rows = [problem(name, line(), text=f"{HOSTILE} {name}") for name in IDS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chains = [
        {"id": f"{name}#0", "chain": f"{HOSTILE}\nAnswer: {'B' if number < 6 else 'A'}", "model": model}
        for number, name in enumerate(IDS)
        for model in ("m1", "m2", "m3")
    ]
    (folder / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chains))
    (folder / "reviewed.jsonl").touch()
    (folder / "run.toml").write_text(TOML)
    for stage in ("questions", "samples"):
        subprocess.run([sys.executable, "-m", "stepladder", stage, "run.toml"], cwd=folder, check=True)
    return folder


@contextlib.contextmanager
def viewing(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and the address that it prints."""
    command = [sys.executable, "-m", "stepladder", "view", "run.toml"]
    environment = os.environ | {"COLUMNS": "300"}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()[1]
        finally:
            process.kill()


@pytest.fixture
def folder(made: Path) -> Path:
    (made / "reviewed.jsonl").write_text("")
    return made


@pytest.fixture
def browser(folder: Path) -> Iterator[Browser]:
    with viewing(folder) as (_, address):
        yield Browser(address)


def items(reply: Reply) -> list[str]:
    return [html.unescape(name) for name in re.findall(r'data-item="([^"]*)"', reply.text)]


def test_only_who_has_the_token_and_comes_by_the_printed_address_is_answered(browser: Browser) -> None:
    assert browser.enter.status == 303
    assert browser.enter.headers["location"] == "/"
    cookie = browser.enter.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    page = browser.get("/")
    assert page.status == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in page.headers["content-security-policy"]
    port = browser.host.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}"):
        assert browser.get("/", Host=host).status == 403
    assert browser.get("/questions", Cookie=" ").status == 403
    assert browser.get("/?token=wrong", Cookie=" ").status == 403
    form = urlencode({"id": "p0#0", "action": "drop"}).encode()
    for origin in ("http://evil.example", "null", f"https://{browser.host}", f"http://localhost:{port}", ""):
        assert browser.send("POST", "/decide", form, Origin=origin).status == 403
    assert browser.send("DELETE", "/", Origin=f"http://{browser.host}").status == 405
    assert browser.send("POST", "/decide", b"x" * 200_000, Origin=f"http://{browser.host}").status == 413
    assert browser.get("/static/..%2f..%2fapp.py").status == 404


def test_pages_show_what_was_written_as_text(browser: Browser) -> None:
    name = quote(f"{IDS[3]}#0")
    for path in ("/", "/questions", "/questions?q=%25&sort=id", "/audit", f"/question?id={name}&left=0&right=1",
                 "/compare", "/decisions", "/live"):  # fmt: skip
        page = browser.get(path)
        assert page.status == 200, path
        for raw in ("<script>alert", "<img src=x", "<b>&quot;", "\u202e", "\u200b"):
            assert raw not in page.text, (path, raw)
        assert "U+202E" in page.text or "alert(1)" not in page.text
        assert not re.search(r"(src|href)=\"(?!/|data:,|#)", page.text), path
        assert " style=" not in page.text
    assert browser.get("/question?id=none").status == 404
    assert browser.get("/questions?page=99999999999&split=%27&wrong=x").status == 200


def test_decisions_are_kept_one_after_the_other_and_can_be_taken_back(browser: Browser, folder: Path) -> None:
    browser.post("/remember", reviewer="Ann & Bob", back="/audit")
    (first,) = items(browser.get("/audit"))
    assert browser.post("/decide", id=first, action="B", note="plainly").headers["location"] == "/audit"
    (second,) = items(browser.get("/audit"))
    browser.post("/decide", id=second, action="A")
    (third,) = items(browser.get("/audit"))
    browser.post("/decide", id=third, action="skip")
    (fourth,) = items(browser.get("/audit"))
    assert len({first, second, third, fourth}) == 4
    browser.post("/decide", id=fourth, action="drop")
    assert browser.post("/decide", action="last").headers["location"] == f"/audit?id={quote(fourth, safe='')}"
    assert items(browser.get("/audit")) == [fourth]
    who = "Ann & Bob"
    assert decisions(folder) == [
        (first, "relabel", "B", who), (second, "keep", None, who), (third, "skip", None, who),
        (fourth, "drop", None, who), (fourth, "undo", None, who),
    ]  # fmt: skip
    assert "plainly" in browser.get("/decisions").text
    listed = browser.get("/questions?decided=1&sort=id").text
    assert "<small>2</small>" in listed
    assert [quote(name) in listed for name in (first, second, third, fourth)] == [True, True, False, False]
    for fields in ({"id": first, "action": "Z"}, {"id": first, "action": "relabel", "answer": "AB"}, {"id": first}):
        assert browser.post("/decide", **fields).status == 400
    assert browser.post("/decide", id="nobody", action="keep").status == 404
    assert browser.post("/decide", id=fourth, action="keep", back="//evil.example").headers["location"] == "/audit"


def test_what_is_fetched_ahead_is_never_what_was_just_shown(browser: Browser) -> None:
    """The page fetches an item before those shown earlier are decided about."""
    page, shown = browser.get("/audit"), list[str]()
    while (after := re.findall(r'data-after="([^"]+)"', page.text)) and len(shown) < 5:
        shown += items(page)
        page = browser.get(f"/audit?part=1&id={quote(html.unescape(after[0]), safe='')}")
    assert len({*shown}) == len(shown) == 5


def test_a_killed_server_has_lost_nothing(folder: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        with viewing(folder) as (process, address):
            browser = Browser(address)
            for _ in range(2):
                (name,) = items(browser.get("/audit"))
                assert browser.post("/decide", id=name, action="keep").status == 303
                told.append(name)
            process.send_signal(signal.SIGKILL)
        assert [name for name, *_ in decisions(folder)] == told
    assert len(set(told)) == 4


def test_two_reviewers_look_at_different_items_and_their_disagreement_is_shown(folder: Path) -> None:
    with viewing(folder) as (_, address):
        ann, bob = Browser(address), Browser(address)
        ann.post("/remember", reviewer="Ann")
        bob.post("/remember", reviewer="Bob")
        pages = ann.get("/audit"), bob.get("/audit")
        (one,), (other,) = map(items, pages)
        ahead = {name for page in pages for name in re.findall(r'data-after="([^"]+)"', page.text)}
        assert len({one, other} | ahead) == 4
        ann.post("/decide", id=one, action="keep")
        bob.post("/decide", id=one, action="B")
        assert "conflict" in ann.get("/decisions").text
        ann.post("/decide", id=one, action="drop", settles="1")
        assert "conflict" not in ann.get("/decisions").text


def test_the_run_goes_on_from_the_decisions(browser: Browser, folder: Path, tmp_path: Path) -> None:
    (name,) = items(browser.get("/audit"))
    browser.post("/decide", id=name, action="B")
    words = [sys.executable, "-m", "stepladder", "questions", "run.toml", "--runs", str(tmp_path)]
    subprocess.run(words, cwd=folder, check=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "questions" / "train.jsonl").read_text().splitlines()]
    rows += [
        json.loads(line) for line in (tmp_path / "run" / "questions" / "validation.jsonl").read_text().splitlines()
    ]
    assert {row["id"]: row["answer"] for row in rows if row["reviewed"]} == {name: "B"}


def test_a_run_at_work_is_seen(folder: Path) -> None:
    context = Context.open(folder / "run.toml", folder / "runs")
    with viewing(folder) as (_, address):
        browser = Browser(address)
        assert "nothing runs" in browser.get("/live").text
        with context.workspace.locked():
            beat = Heartbeat(context.workspace.heartbeat)
            beat.begin("adapter/a")
            beat.move("step", 30, 120, "loss 0.5", 90.0, 0.5)
            page = browser.get("/live").text
        assert "adapter/a: step, 30 of 120 · loss 0.5 · about 1 min 30 s left" in page
        assert "nothing runs" in browser.get("/live").text


def test_a_label_that_a_worked_solution_proves_is_not_in_doubt(tmp_path: Path) -> None:
    rows = [problem(f"open{number}", line()) for number in range(6)]
    rows += [problem(f"known{number}", line(worked="Ann came first.\nAnn")) for number in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chains = [{"id": f"{row['id']}#0", "chain": "Answer: B", "model": "m1"} for row in rows]
    (tmp_path / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chains))
    (tmp_path / "reviewed.jsonl").touch()
    (tmp_path / "run.toml").write_text(f'{TOML}[[rung]]\nname = "worked"\nkind = "worked"\n')
    for stage in ("questions", "samples"):
        subprocess.run([sys.executable, "-m", "stepladder", stage, "run.toml"], cwd=tmp_path, check=True)
    learned = (tmp_path / "runs" / "run" / "questions" / "train.jsonl").read_text()
    in_doubt = [f"open{number}#0" for number in range(6) if f'"open{number}#0"' in learned]
    index = Index(tmp_path / "runs" / "run")
    assert index.doubtful == in_doubt
    _, listed = index.find({"split": "train"}, "doubt", 0, 12)
    assert [row.id for row in listed[: len(in_doubt)]] == in_doubt
    assert len(listed) > len(in_doubt)


def test_the_pages_as_files_lead_to_each_other_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages"
    words = [sys.executable, "-m", "stepladder", "view", "run.toml", "--export", str(out)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    pages = [*out.glob("*.html")]
    assert f"{len(pages)} pages" in done.stdout
    assert sum(page.name.startswith("question-") for page in pages) == len(IDS)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text
        assert "<form" not in text
        for target in re.findall(r'(?:href|src)="([^"#]+)"', text):
            assert target == "data:," or (out / target).is_file(), (page.name, target)
    assert subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode == 2


def test_without_the_extra_one_line_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["stepladder", "view", str(folder / "run.toml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "uvicorn is not installed: pip install 'stepladder[web]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("安比鲍勃高。所以安最高。", "安比鲍勃高。所以鲍勃最高。", [True, False]),
        ("One. Two.", "One. Two. Three.", [True, False, False]),
        ("", "", []),
        ("a" * 10**5, "b" * 10**5, [False]),
    ],
)
def test_chains_are_aligned_by_sentence(left: str, right: str, same: list[bool]) -> None:
    assert [is_same for _, _, is_same in marks.aligned(left, right)] == same


def test_differences_are_marked_by_character() -> None:
    ((old, new, _),) = marks.aligned("所以<安>最高", "所以<鲍勃>最高")
    assert old == "所以&lt;<del>安</del>&gt;最高"
    assert new == "所以&lt;<ins>鲍勃</ins>&gt;最高"


def test_the_line_that_a_letter_is_read_from_is_marked() -> None:
    assert marks.chain("First.\nAnswer: A\n", ["x", "y"]) == "First.\n<mark>Answer: A</mark>"
    assert "<mark>" not in marks.chain("Who knows?", ["x", "y"])


def test_every_word_of_the_pages_has_a_translation() -> None:
    templates = Path(marks.__file__).parent / "templates"
    used = {
        word
        for file in templates.glob("*.j2")
        for word in re.findall(r"""\bt\("([^"]+)"\)""", file.read_text(encoding="utf-8"))
    }
    assert used <= words.ZH.keys()
