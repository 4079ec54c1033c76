"""Questions in the forms people have them, each read as its own documentation says it is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stepladder import cli
from stepladder.commands import import_
from stepladder.mcq.questionfile import read_problems

ROW = {"question": "Who?", "options": ["Ann", "Bob", "Cleo"], "answer": "B"}
CHOICES = {"label": ["A", "B"], "text": ["Ann", "Bob"]}
BBH_INPUT = "Ann is tall.\nWho is tall?\nOptions:\n(A) Ann\n(B) Bob"
LOGIQA = """
b
All cats sleep. Tom is a cat.
Which follows?
A.Tom barks.
B.Tom sleeps.
C.Tom flies.
D.None.

a
Second passage.
And here?
A. yes
B. no
C. maybe
D. never
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def go(name: str, content: str | bytes, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
        """Exit code, what was said, and the questions as a run reads them."""
        source, out = tmp_path / name, tmp_path / "out.jsonl"
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(sys, "argv", ["stepladder", "import", str(source), str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        found = read_problems(out, "en", labelled=False) if out.exists() else []
        rows = [
            {"problem": q.problem, "question": q.question, "options": list(q.options), "answer": q.answer}
            for problem in found
            for q in problem.questions
        ]
        return int(ended.value.code or 0), " ".join((said.out + said.err).split("\n")), rows

    return go


@pytest.mark.parametrize(
    ("name", "content", "arguments"),
    [
        ("a.jsonl", json.dumps(ROW), ()),
        ("a.json", json.dumps([ROW]), ()),
        ("a.jsonl", json.dumps(ROW | {"answer": 1}), ()),
        ("a.jsonl", json.dumps(ROW | {"answer": "(b)"}), ()),
        ("a.jsonl", json.dumps(ROW | {"answer": "Bob"}), ()),
        ("a.jsonl", json.dumps(ROW | {"answer": 2}), ("--one-based",)),
        ("a.jsonl", json.dumps(ROW | {"options": ["(A) Ann", "(B) Bob", "(C)Cleo"]}), ()),
        ("a.jsonl", json.dumps({"q": "Who?", "x": "Ann", "y": "Bob", "z": "Cleo", "a": "1"}),
         ("--question", "q", "--options", "x,y,z", "--answer", "a")),
        ("a.csv", "question,A,B,C,answer\nWho?,Ann,Bob,Cleo,B\n", ()),
        ("a.csv", 'question,choices,label\nWho?,"[""Ann"", ""Bob"", ""Cleo""]",1\n', ()),
        ("a.csv", "Who?,Ann,Bob,Cleo,B\n", ()),
        ("a.dat", "Who?,Ann,Bob,Cleo,B\n", ("--format", "mmlu")),
    ],
)  # fmt: skip
def test_one_question_in_many_forms(run: Any, name: str, content: str, arguments: tuple[str, ...]) -> None:
    code, said, rows = run(name, content, *arguments)
    assert code == 0, said
    assert rows == [{"problem": "", **ROW}]
    assert said.rstrip().endswith(": 1 question")


def test_rows_that_share_a_passage_are_one_problem(run: Any) -> None:
    rows = [ROW | {"passage": "P."}, ROW | {"passage": "Q."}, ROW | {"passage": "P.", "question": "And?"}]
    code, _, found = run("agieval.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert code == 0
    assert [(row["problem"], row["question"]) for row in found] == [("P.", "Who?"), ("P.", "And?"), ("Q.", "Who?")]


def test_agieval_bbh_hugging_face_and_logiqa(run: Any) -> None:
    agieval = {"passage": "P.", "question": "Who?", "options": ["(A)Ann", "(B)Bob"], "label": "B", "answer": None}
    assert run("a.jsonl", json.dumps(agieval))[2] == [
        {"problem": "P.", "question": "Who?", "options": ["Ann", "Bob"], "answer": "B"}
    ]
    bbh = {"canary": "x", "examples": [{"input": BBH_INPUT, "target": "(A)"}]}
    assert run("b.json", json.dumps(bbh))[2] == [
        {"problem": "", "question": "Ann is tall.\nWho is tall?", "options": ["Ann", "Bob"], "answer": "A"}
    ]
    hub = {"question": "Who?", "choices": CHOICES, "answerKey": "B"}
    assert run("c.jsonl", json.dumps(hub), "--answer", "answerKey")[2][0]["options"] == ["Ann", "Bob"]
    first, second = run("d.txt", LOGIQA)[2]
    assert first["problem"] == "All cats sleep. Tom is a cat."
    assert (first["question"], first["answer"], first["options"][1]) == ("Which follows?", "B", "Tom sleeps.")
    assert (second["answer"], len(second["options"])) == ("A", 4)


def test_parquet(run: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["Who?"], "choices": [["Ann", "Bob"]], "answer": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "made.parquet")
    code, _, rows = run("a.parquet", (tmp_path / "made.parquet").read_bytes())
    assert (code, rows[0]["answer"], rows[0]["options"]) == (0, "B", ["Ann", "Bob"])


def test_many_pieces_and_files_give_what_one_does(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages whose questions are in several pieces, and in files of their own."""
    passages = ["", "One text.", "Another.", "One text.", "", "Third.", "One text."]
    rows = [json.dumps(ROW | {"question": f"Who, {n}?", "passage": text}) + "\n" for n, text in enumerate(passages * 9)]
    _, _, whole = run("a.jsonl", "".join(rows))
    assert len(whole) == len(rows)
    one = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(import_, "PIECE_BYTES", 800)
    assert run("a.jsonl", "".join(rows))[2] == whole
    assert (tmp_path / "out.jsonl").read_bytes() == one
    for name, part in (("b-0.jsonl", rows[:20]), ("b-1.jsonl", rows[20:])):
        (tmp_path / name).write_text("".join(part))
    monkeypatch.setattr(sys, "argv", ["stepladder", "import", str(tmp_path / "b-?.jsonl"), str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit):
        cli.main()
    both = read_problems(tmp_path / "out.jsonl", "en", labelled=False)
    assert [q.question for problem in both for q in problem.questions] == [row["question"] for row in whole]
    assert [*[problem.id for problem in both][:2], both[-1].id] == ["b-0-0", "b-0-1", f"b-1-{len(both) - 1}"]
    assert not [*tmp_path.glob(".*")]


def test_questions_without_answers_stay_without(run: Any) -> None:
    assert run("a.jsonl", json.dumps({"question": "Who?", "options": ["Ann", "Bob"]}))[2][0]["answer"] is None


@pytest.mark.parametrize(
    ("name", "content", "arguments", "said"),
    [
        (
            "a.jsonl",
            json.dumps(ROW | {"answer": "E"}),
            (),
            "a.jsonl:1: field 'answer': 'E' is neither a letter from A to C",
        ),
        (
            "a.jsonl",
            json.dumps(ROW | {"answer": 3}),
            (),
            "a.jsonl:1: field 'answer': 3 is neither a letter from A to C nor",
        ),
        ("a.jsonl", json.dumps(ROW | {"answer": True}), (), "field 'answer': True"),
        ("a.jsonl", json.dumps(ROW | {"options": ["Ann"]}), (), "field 'options': has 1 options"),
        ("a.jsonl", json.dumps({"question": "Who?"}), (), "field 'options': has 0 options"),
        ("a.jsonl", json.dumps({"question": "Who?", "options": 5}), (), "has no list of options"),
        ("a.jsonl", json.dumps({"text": "Who?"}), (), "field 'question': has no such field; there are text"),
        ("a.jsonl", json.dumps(ROW), ("--options", "x,y"), "field 'x': has no such field"),
        ("a.jsonl", "[1]", (), "a.jsonl:1: is not an object with named fields"),
        ("a.jsonl", "", (), "holds no questions"),
        ("a.json", "{", (), "not JSON"),
        ("a.json", "{}", (), "is not a list of objects"),
        ("a.json", '{"examples": [{"input": "free text", "target": "x"}]}', (), "example 1 is not multiple choice"),
        ("a.json", '{"examples": [{}]}', (), "example 1 has no text"),
        ("a.json", '{"examples": 1}', (), "holds no list"),
        ("a.json", '[{"question": "\\ud800"}]', (), "a.json: holds half a character"),
        ("a.txt", "b\nonly this\n", (), "a.txt:1: a block needs a letter, a passage"),
        ("a.csv", b"\xff\xfe", (), "not UTF-8 at byte 0"),
        ("a.parquet", "no", (), "not Parquet"),
        ("a.dat", "x", (), "its name does not tell the format"),
        ("a.jsonl", json.dumps(ROW), ("--format", "docx"), "there is no format 'docx'; choose from table"),
    ],
)
def test_what_cannot_be_read_is_named(
    run: Any, name: str, content: str | bytes, arguments: tuple[str, ...], said: str
) -> None:
    code, message, rows = run(name, content, *arguments)
    assert code == 2
    assert said in message.replace("  ", " ")
    assert rows == []
