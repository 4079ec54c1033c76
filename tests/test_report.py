"""The report on a small synthetic run: answers invented here, written with the real records, read by the real code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from made import card, verdict
from rich.console import Console

from stepladder.config import Config, Member, Questions, Rung
from stepladder.context import STAGES, Context, parts
from stepladder.errors import InputError, UserError
from stepladder.mcq.position import commonest_letters
from stepladder.progress import Progress
from stepladder.records import LETTERS, Prediction, Question, Record, Sample, lines, read
from stepladder.reporting.content import Report
from stepladder.reporting.numbers import family
from stepladder.stages import report
from stepladder.workspace import Workspace

SCRIPT = "<script>alert('model')</script>"

# One character a question: 1 right, 0 wrong, - unparsed. Two questions make a problem.
VALIDATION = {
    "base": "0100", "m1/merged": "1101", "m1/quantised": "1101", "m2/merged": "1111", "m2/quantised": "1100",
    "ensemble": "1101",
}  # fmt: skip
TEST = {
    "base": "1000-000", "m1/merged": "11111110", "m1/quantised": "1111011-", "m2/merged": "11111111",
    "m2/quantised": "11111111", "ensemble": "11111110",
}  # fmt: skip


def questions(split: str, count: int) -> list[Question]:
    return [
        Question(
            id=f"{split}{i // 2}#{i % 2}",
            problem_id=f"{split}{i // 2}",
            problem=f"Problem {i // 2} of {split}.",
            question=f"Which? {SCRIPT}",
            options=("one", "two", "three", "four") if i < count // 2 else ("one", "two"),
            answer="AB"[i % 2],
            language="en",
            source="closedworld/ordering/2" if i < count // 2 else "exam<script>/2023",
        )
        for i in range(count)
    ]


def predictions(member: str, asked: list[Question], marks: str) -> list[Prediction]:
    rows = []
    for question, mark in zip(asked, marks, strict=True):
        label = question.answer or "A"
        wrong = LETTERS[(LETTERS.index(label) + 1) % len(question.options)]
        answer = {"1": label, "0": wrong, "-": None}[mark]
        said = answer or f"{label}, I think"  # which only the lenient rule reads
        text = f"{SCRIPT} so it is\nAnswer: {said}"
        rows.append(Prediction(question_id=question.id, member=member, votes=(answer,), answer=answer, texts=(text,)))
    return rows


def put(path: Path, content: dict[str, Any] | Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if isinstance(content, dict) else "".join(lines(content)), encoding="utf-8")


def sample(question: str, rung: str, verdict: str, micro_dollars: int) -> Sample:
    return Sample.model_validate(
        {
            "question_id": question, "rung": rung, "model": "m", "sample_index": 0, "permutation": (0, 1), "key": "k",
            "text": "t", "answer": "A", "verdict": verdict, "micro_dollars": micro_dollars,
        }
    )  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A finished run of two members, up to the report."""
    config = Config(
        name="tiny",
        language="en",
        questions=Questions(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl")),
        rung=(Rung(name="proof", kind="worked"), Rung(name="rest", kind="worked")),
        member=(Member(name="m1"), Member(name="m2")),
    )
    context = Context(config, Workspace(tmp_path / "runs", "tiny"), Progress(Console(file=StringIO())))
    run = context.workspace.folder
    splits = {"train": questions("t", 2), "validation": questions("v", 4), "test": questions("x", 8)}
    unlabelled = splits["test"][0].model_copy(update={"id": "x9#0", "answer": None})
    for split, rows in splits.items():
        put(run / "questions" / f"{split}.jsonl", [*rows, unlabelled] if split == "test" else rows)
    finding = {"kind": "repeated option", "file": "train.jsonl", "line": 3, "message": "t1#0 <b>twice</b>"}
    put(
        run / "questions/audit.json",
        {
            "problems": 7,
            "questions": {"train": 2, "validation": 4, "test": 9},
            "reviewed": {},
            "counts": {"repeated option": 1},
            "findings": [finding],
        },
    )
    for split, marks in (("validation", VALIDATION), ("test", TEST)):
        for system, answers in marks.items():
            member, _, kind = system.partition("/")
            given = predictions(member, splits[split], answers)
            if split == "test":
                given += predictions(member, [unlabelled], "1")
            folder = "ensemble" if system == "ensemble" else f"predictions/{member}"
            put(run / folder / (f"{split}.jsonl" if system == "ensemble" else f"{kind or 'base'}.{split}.jsonl"), given)
    put(run / "samples/accepted.jsonl", [sample("t0#0", "proof", "accepted", 0)])
    put(run / "samples/rejected.jsonl", [sample("t0#1", "rest", "wrong", 1_250_000)])
    counts = {"kind": "ask", "wrong": 0, "unparsed": 0, "truncated": 0}
    rungs = [
        {"name": "proof", "asked": 2, "solved": 1} | counts,
        {"name": "rest", "asked": 1, "solved": 0} | counts,
    ]
    bias = {"model": "<b>m</b>", "answers": 3, "recall": {"A": 0.5, "B": 1.0}, "chosen": {"A": 0.75, "B": 0.25}}
    bias |= {"shown": {"A": 0.5, "B": 0.5}, "consistency": None}
    summary = {"rungs": rungs, "questions": 2, "unsolved": 1, "suspect": 4, "positions": [bias]}
    put(run / "samples/summary.json", summary)
    for member in ("m1", "m2"):
        for name, document in (("trainset", card()), ("quantised", verdict())):
            (run / name / member).mkdir(parents=True)
            document.write(run / name / member)
        steps = [{"step": i, "epoch": i / 4, "loss": 2 / i, "learning_rate": 1e-4, "tokens": 9} for i in range(1, 5)]
        log = run / "adapter" / member / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    put(
        run / "ensemble/choice.json",
        {
            "rule": "vote", "leader": "m1", "members": ["m1", "m2"],
            "validation": {
                "rules": {name: {"accuracy": 0.75, "low": 0.5, "high": 0.9} for name in ("single", "vote")},
                "chosen": {"accuracy": 0.7, "low": 0.45, "high": 0.85}, "oracle": 0.95,
                "choice": "vote", "leader": "m1",
                "correlation": [["m1", "m2", 0.25]],
            },
        },
    )  # fmt: skip
    for name in STAGES[:-1]:
        for part in parts(config, name):
            put(run / name / (part or "") / "manifest.json", {"seconds": 61.0})
    return context


def built(context: Context, name: str = "out") -> Path:
    folder = context.workspace.runs / name
    folder.mkdir()
    report.build(context, None, folder)
    return folder


def numbers(context: Context) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((built(context) / "report.json").read_text(encoding="utf-8"))
    return content


def summarised(content: dict[str, Any]) -> str:
    screen = StringIO()
    report.summary(Report.model_validate(content), Console(file=screen, width=200))
    return " ".join(screen.getvalue().split())  # tables pad and wrap; \u00a0 counts as a space here


def test_results_are_the_hand_counted_ones(context: Context) -> None:
    rows = numbers(context)["results"]
    counted = {
        (row["split"], row["system"], row["member"]): (row["correct"], row["n"], row["unparsed"]) for row in rows
    }
    assert counted == {
        ("validation", "base", None): (1, 4, 0),
        ("validation", "merged", "m1"): (3, 4, 0),
        ("validation", "merged", "m2"): (4, 4, 0),
        ("validation", "quantised", "m1"): (3, 4, 0),
        ("validation", "quantised", "m2"): (2, 4, 0),
        ("validation", "ensemble", None): (3, 4, 0),
        ("test", "base", None): (1, 8, 1),
        ("test", "merged", "m1"): (7, 8, 0),
        ("test", "merged", "m2"): (8, 8, 0),
        ("test", "quantised", "m1"): (6, 8, 1),
        ("test", "quantised", "m2"): (8, 8, 0),
        ("test", "ensemble", None): (7, 8, 0),
    }
    assert set(rows[0]) == {
        "system", "member", "split", "n", "correct", "accuracy", "low", "high", "unparsed", "lenient", "forced",
    }  # fmt: skip
    assert all(row["lenient"] == row["correct"] + row["unparsed"] for row in rows)
    assert all(row["accuracy"] == row["correct"] / row["n"] for row in rows)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    perfect = next(row for row in rows if row["correct"] == 8)
    assert (perfect["low"], perfect["high"]) == (pytest.approx(0.025 ** (1 / 4)), 1)  # four problems, all right


def test_chance_is_the_mean_of_one_over_the_options(context: Context) -> None:
    assert numbers(context)["chance"] == {"validation": 0.375, "test": 0.375}


def test_the_commonest_letter_of_training_is_a_figure_to_beat(context: Context) -> None:
    train = read(context.input("questions") / "train.jsonl", Question)
    letters = commonest_letters(train)
    for split, share in numbers(context)["commonest"].items():
        questions = read(context.input("questions") / f"{split}.jsonl", Question)
        labelled = [question for question in questions if question.answer is not None]
        hits = [question.answer == letters.get(len(question.options), "A") for question in labelled]
        assert share == sum(hits) / len(hits)


def test_the_commonest_letter_is_counted_by_number_of_options() -> None:
    asked = [("AB", "B"), ("AB", "B"), ("AB", "A"), ("ABC", "C"), ("ABC", "A")]
    questions = [
        Question(
            id=str(n), problem_id="p", problem="P.", question="?", options=tuple(options), answer=answer, language="en",
            source="s",
        )
        for n, (options, answer) in enumerate(asked)
    ]  # fmt: skip
    assert commonest_letters(questions) == {2: "B", 3: "A"}


def test_best_member_is_chosen_on_validation_even_where_test_disagrees(context: Context) -> None:
    content = numbers(context)
    assert content["run"]["best_member"] == "m1"
    assert content["comparisons"][-1]["before"] == {"system": "quantised", "member": "m1"}


def test_best_member_ties_go_to_the_first(context: Context) -> None:
    folder = context.input("predictions", "m2")
    (folder / "quantised.validation.jsonl").write_bytes(
        (context.input("predictions", "m1") / "quantised.validation.jsonl").read_bytes()
    )
    assert numbers(context)["run"]["best_member"] == "m1"


def test_comparisons_count_flips_with_exact_p(context: Context) -> None:
    rows = numbers(context)["comparisons"]
    assert [(row["before"]["system"], row["after"]["system"], row["after"]["member"]) for row in rows] == [
        ("base", "merged", "m1"),
        ("merged", "quantised", "m1"),
        ("base", "merged", "m2"),
        ("merged", "quantised", "m2"),
        ("quantised", "ensemble", None),
    ]
    assert [(row["b"], row["c"]) for row in rows] == [(0, 6), (1, 0), (0, 7), (0, 0), (0, 1)]
    # One-sided outcomes of a fair coin, twice: 2 / 2**6, 2 / 2**7.
    assert [row["p"] for row in rows] == pytest.approx([2 / 64, 1, 2 / 128, 1, 1])
    assert [row["p_holm"] for row in rows] == pytest.approx([4 * 2 / 64, 1, 5 * 2 / 128, 1, 1])


def test_families_and_letters(context: Context) -> None:
    content = numbers(context)
    rows = {
        (row["split"], row["family"], row["system"]): (row["correct"], row["n"])
        for row in content["families"]
        if row["member"] in (None, "m1")
    }
    assert rows["test", "ordering", "base"] == (1, 4)
    assert rows["test", "exam<script>", "quantised"] == (2, 4)
    letters = {(row["split"], row["letter"], row["system"], row["member"]): row for row in content["letters"]}
    assert letters["test", "B", "quantised", "m1"]["correct"] == 3
    assert letters["test", "B", "quantised", "m1"]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("source", "expected"), [("closedworld/ordering/2", "ordering"), ("a/b/c", "a/b"), ("train", "train")]
)
def test_family_of_a_source(source: str, expected: str) -> None:
    assert family(source) == expected


def test_examples_show_gains_over_base_from_different_families_then_mistakes(context: Context) -> None:
    rows = numbers(context)["examples"]
    assert [(row["id"], row["right"], row["base_right"], row["answer"]) for row in rows] == [
        ("x0#1", True, False, "B"),
        ("x2#1", True, False, "B"),
        ("x2#0", False, False, "B"),
        ("x3#1", False, False, None),
    ]
    assert rows[0]["text"].endswith("so it is\nAnswer: B")


def test_money_is_counted_per_rung_and_stage(context: Context) -> None:
    content = numbers(context)
    assert [rung["dollars"] for rung in content["cascade"]["rungs"]] == [0, 1.25]
    spent = {row["stage"]: row["dollars"] for row in content["stages"]}
    assert spent.pop("samples") == 1.25
    assert set(spent.values()) == {0}
    assert {row["seconds"] for row in content["stages"]} == {61.0}


def test_rebuild_is_identical_to_the_byte_and_names_no_path_of_the_machine(context: Context) -> None:
    first, second = built(context, "first"), built(context, "second")
    assert sorted(path.name for path in first.iterdir()) == ["report.html", "report.json"]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert str(context.workspace.runs.parent) not in path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would see: tags, and every address it would follow or load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "hr", "img", "link"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "hr", "img", "link"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_escaped_and_loads_nothing(context: Context) -> None:
    html = (built(context) / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert page.addresses == []
    assert not re.search(r"@import|url\(", html)
    assert "&lt;script&gt;alert(" in html
    assert "&lt;b&gt;twice&lt;/b&gt;" in html
    assert page.tags.count("svg") == 9


def test_page_shows_the_main_numbers(context: Context) -> None:
    html = (built(context) / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "<h1>base 12 % → tuned 88 % → 4-bit 75 % → ensemble 88 %</h1>" in html
    assert "on 8 held-out test questions; guessing would get 38 %" in html
    assert "<td>6 newly right, 0 newly wrong</td>" in html
    assert "Within noise" in html


def test_summary_in_the_terminal(context: Context) -> None:
    shown = summarised(numbers(context))
    assert "4-bit m1 6/8 75.0 %" in shown
    assert "2 training questions: proof solved 1 of 2, rest solved 0 of 1; 1 unsolved; $1.25 spent" in shown
    assert "on 8 test questions: 1 newly right, 0 newly wrong; within noise (p = 1)" in shown


def test_without_test_labels_validation_is_shown(context: Context) -> None:
    path = context.input("questions") / "test.jsonl"
    bare = [question.model_copy(update={"answer": None}) for question in questions("x", 8)]
    path.write_text("".join(lines(bare)), encoding="utf-8")
    content = numbers(context)
    assert content["run"]["split"] == "validation"
    assert {row["split"] for row in content["results"]} == {"validation"}
    assert "on 4 held-out validation questions" in summarised(content)


@pytest.mark.parametrize("rule", ["single", "vote"])
def test_one_member_alone_is_said_so(context: Context, rule: str) -> None:
    alone = context.config.model_copy(update={"member": context.config.member[:1]})
    choice = {"rule": rule, "leader": "m1", "members": ["m1"], "validation": None}
    put(context.input("ensemble") / "choice.json", choice)
    content = numbers(Context(alone, context.workspace, context.progress))
    shown = summarised(content)
    assert "There is one member, m1" in shown
    assert "base 12 % → tuned 88 % → 4-bit 75 % on 8 held-out" in shown
    assert [row["after"]["system"] for row in content["comparisons"]] == ["merged", "quantised"]


def test_merged_members_that_did_not_answer_the_test_are_left_out(context: Context) -> None:
    predict = context.config.predict.model_copy(update={"merged_test": "leader"})
    context = dataclasses.replace(context, config=context.config.model_copy(update={"predict": predict}))
    (context.input("predictions", "m2") / "merged.test.jsonl").unlink()
    content = numbers(context)
    merged = [(row["split"], row["member"]) for row in content["results"] if row["system"] == "merged"]
    assert merged == [("validation", "m1"), ("validation", "m2"), ("test", "m1")]
    pairs = [
        (row["before"]["system"], row["after"]["system"], row["after"]["member"]) for row in content["comparisons"]
    ]
    assert ("base", "quantised", "m2") in pairs
    assert ("base", "merged", "m1") in pairs
    assert "<h1" in (built(context, "page") / "report.html").read_text(encoding="utf-8")
    assert "m2" in summarised(content)


def test_a_missing_answer_is_an_error_that_names_the_file(context: Context) -> None:
    path = context.input("predictions", "m2") / "merged.test.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(InputError, match=r"m2/merged\.test\.jsonl: no answer to question x0#0"):
        built(context)


def test_validation_without_labels_is_an_error(context: Context) -> None:
    (context.input("questions") / "validation.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no validation question has a label"):
        built(context)


def test_a_document_with_a_wrong_field_is_an_error_that_names_it(context: Context) -> None:
    path = context.input("ensemble") / "choice.json"
    put(path, json.loads(path.read_text(encoding="utf-8")) | {"members": 3})
    with pytest.raises(InputError, match=r"choice\.json: field 'members': .*; delete .* and run its stage again"):
        built(context)


def test_an_unfinished_run_is_told_what_to_do(context: Context, tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).touch()
    (context.input("questions") / "manifest.json").unlink()
    with pytest.raises(UserError, match="not there yet; run the stages before this one"):
        report.artifact(context, None)


def test_what_more_votes_buy(context: Context) -> None:
    assert json.loads((built(context, "before") / "report.json").read_text(encoding="utf-8"))["voting"] == []
    path = context.input("predictions", "m1") / "quantised.test.jsonl"
    given = read(path, Prediction)
    # Every question: two votes as it was, or where it was wrong a third and fourth time something else.
    votes = [(one.answer, one.answer, "A", "A") if one.answer == "B" else ("A", "B", "B", "B") for one in given]
    path.write_text(
        "".join(
            lines(
                one.model_copy(update={"votes": some, "texts": ("t",) * 4, "tokens": (10, 10, 20, 20)})
                for one, some in zip(given, votes, strict=True)
            )
        ),
        encoding="utf-8",
    )
    folder = built(context)
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = {row["way"]: row for row in content["voting"]}
    assert list(rows) == ["1 vote", "at most 2", "at most 3", "at most 4", "adaptive"]
    assert [rows[way]["tokens"] for way in ("1 vote", "at most 4")] == [10, 60]
    assert rows["adaptive"]["votes"] == 3  # 4 of 8 labelled questions are decided by two votes, the others by four
    assert 20 < rows["adaptive"]["tokens"] < 60
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Accuracy against tokens spent" in page
    assert "adaptive: " in page
