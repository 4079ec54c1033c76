"""What people write: repaired where only one reading is possible, reported, and never dropped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder import cli, records
from stepladder.errors import InputError
from stepladder.mcq.audit import MAX_FINDINGS_LISTED
from stepladder.mcq.questionfile import read_problems, stream_problems
from stepladder.mcq.repair import Note, clean, repair
from stepladder.mcq.shuffle import fixed, orders, shown, to_original, to_shown
from stepladder.mcq.verify import judge
from stepladder.records import LETTERS, Question
from stepladder.stages.questions import validation_ids


def question(*options: str, text: str = "Which?", answer: str | None = "A") -> Question:
    return Question(
        id="p#0", problem_id="p", problem="P.", question=text, options=options, answer=answer, language="en", source="s"
    )


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  plain ", "plain"),
        ("first\\n2. second", "first\n2. second"),
        ("no \n\\n", "no"),
        ("one.\n\\nSo answer:", "one.\nSo answer:"),
        ("$a \\neq b$ and \\nu", "$a \\neq b$ and \\nu"),
        ("Question 1:**\nWho?", "Question 1:\nWho?"),
        ("**bold** stays", "**bold** stays"),
        ("2 ** 3 is a power", "2 ** 3 is a power"),
        ("A list:\n```", "A list:"),
        ("```\ncode\n```", "```\ncode\n```"),
        ("[a, b]`", "[a, b]"),
        ("`a` and `b`", "`a` and `b`"),
        ("", ""),
    ],
)
def test_debris_goes_and_all_else_stays(text: str, cleaned: str) -> None:
    notes: list[Note] = []
    assert clean(text, notes) == cleaned
    assert bool(notes) == (cleaned != text.strip())
    assert clean(cleaned, []) == cleaned


@pytest.mark.parametrize(
    ("options", "answer", "split", "moved"),
    [
        (("yes", "no\nC. unknown"), "B", ("yes", "no", "unknown"), "B"),
        (("yes", "no\nC. unknown"), "C", ("yes", "no", "unknown"), "C"),
        (("one\nB、two", "three"), "B", ("one", "two", "three"), "C"),
        (("one\nB、two", "three"), "A", ("one", "two", "three"), "A"),
        (("yes", "no\nD. maybe"), "A", ("yes", "no", "maybe"), "A"),
        (("x\nB. y\nC: z\nD）w",), "D", ("x", "y", "z", "w"), "D"),
        (("1. left\n2. right", "B"), "A", ("1. left\n2. right", "B"), "A"),
        (("steps:\nC. then\nA. first", "none"), "B", ("steps:\nC. then\nA. first", "none"), "B"),
        (("p", "q"), None, ("p", "q"), None),
    ],
)
def test_merged_options_are_split_and_the_label_follows_its_option(
    options: tuple[str, ...], answer: str | None, split: tuple[str, ...], moved: str | None
) -> None:
    found = repair("Which?", options, answer)
    assert (found.options, found.answer) == (split, moved)
    assert ("merged options" in [note.kind for note in found.notes]) == (split != options)


def test_a_merged_option_that_would_leave_the_alphabet_is_left_whole() -> None:
    options = ("Spain\nB. Japan", *(f"country {number}" for number in range(25)))
    repaired = repair("Which?", options, "Z")
    assert (repaired.options, repaired.answer) == (options, "Z")


@pytest.mark.parametrize(
    ("stem", "options", "kinds"),
    [
        ("选择题 3：", ("a", "b"), ["empty question"]),
        ("Question 3:", ("a", "b"), ["empty question"]),
        ("选择题 3：谁？", ("a", "b", "a"), ["repeated option"]),
        ("Who?", ("a", "\ufffd"), ["broken text"]),
        ("谁高？正确答案：B", ("a", "b"), ["leaked answer"]),
        ("Who? The answer is B.", ("a", "b"), ["leaked answer"]),
        ("Who? (Answer: A)", ("a", "b"), ["leaked answer"]),
        ("选出正确的答案：A 和 B 谁高？", ("a", "b"), ["leaked answer"]),  # better one too many
        ("请选择正确答案：", ("a", "b"), []),
        ("What is the answer? A dog or a cat?", ("a", "b"), []),
        ("Who?", ("a", " "), ["empty option"]),
    ],
)
def test_what_cannot_be_put_right_is_said(stem: str, options: tuple[str, ...], kinds: list[str]) -> None:
    found = repair(stem, options, "A")
    assert [note.kind for note in found.notes] == kinds
    assert len(found.options) == len(options)


OF_OTHERS = [
    "以上都不是", "以上都是", "以上皆非", "上述均不正确", "所有上述选项", "以上两个答案都对", "都不是", "两者都可以",
    "None of the above", "All of the above.", "none", "Both", "Neither of them", "all options are correct",
]  # fmt: skip
BY_LETTER = ["A和B", "选项A和B都正确", "A 和 C", "Both A and B", "Neither A nor B", "A and C", "Option B"]
PLAIN = [
    "Irina和Natasha",
    "所有哺乳动物都不吃肉",
    "above the door",
    "Nobody",
    "A large box",
    "vitamin B",
    "以前",
    "All dogs",
    "x",
]


@pytest.mark.parametrize("option", OF_OTHERS)
def test_an_option_that_speaks_of_the_others_keeps_its_place(option: str) -> None:
    assert fixed(question("one", "two", "three", option)).places == {3}


@pytest.mark.parametrize("option", BY_LETTER)
def test_options_named_by_letters_do_not_move(option: str) -> None:
    assert fixed(question("one", "two", "three", option)).places == {0, 1, 2, 3}
    assert fixed(question("A", "B", "C")).places == {0, 1, 2}
    assert fixed(question("one", "two", text="Why is option B wrong?")).places == {0, 1}


@pytest.mark.parametrize("option", PLAIN)
def test_ordinary_options_move_freely(option: str) -> None:
    assert not fixed(question("one", "two", "three", option)).places


@given(st.data(), st.integers(2, 8), st.integers(1, 30))
def test_shuffling_is_undone_and_fixed_options_stay(data: st.DataObject, size: int, count: int) -> None:
    places = data.draw(st.frozensets(st.integers(0, size - 1)))
    options = [f"option {at}" for at in range(size)]
    for order in orders(count, size, data.draw(st.integers()), places=places):
        assert sorted(order) == list(range(size))
        seen = shown(options, order)
        for at, letter in enumerate(LETTERS[:size]):
            assert to_shown(to_original(letter, order), order) == letter
            assert to_original(to_shown(letter, order), order) == letter
            assert seen[LETTERS.index(to_shown(letter, order))] == options[at]
        assert all(order[place] == place for place in places)


@given(st.permutations(["one", "two", "three", "以上都不是", "None of the above"]), st.integers())
def test_no_order_breaks_an_option_that_speaks_of_those_above(options: list[str], seed: int) -> None:
    asked = question(*options)
    for order in orders(5, len(options), seed, places=fixed(asked).places):
        for at, option in enumerate(options):
            if option in OF_OTHERS:
                assert order[at] == at
                assert set(order[:at]) == set(range(at))


def test_two_options_of_the_same_text_are_both_right() -> None:
    asked = question("b", "a", "b", answer="C")
    assert [judge(asked, (0, 1, 2), f"Answer: {letter}", finished=True).verdict for letter in "ABC"] == [
        "accepted",
        "wrong",
        "accepted",
    ]


def line(**changes: Any) -> dict[str, Any]:
    return {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"} | changes


def test_findings_say_where(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [
        {"id": "one", "problem": "P.\\n", "questions": [line(), line(options=["Ann", "Bob\nC. Cleo"], answer="C")]},
        {"id": "two", "problem": "Q.", "questions": [line(options=["Ann\nB. Bob"], answer="B")]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = read_problems(file, "en", labelled=True)
    assert [(about, note.kind) for about, note in one.notes] == [("one", "debris"), ("one#1", "merged options")]
    assert one.questions[1].options == ("Ann", "Bob", "Cleo")
    assert one.questions[1].answer == "C"
    assert two.questions[0].options == ("Ann", "Bob")


TOML = """
name = "run"
seed = 0
language = "en"
[questions]
train = "train.jsonl"
{more}
[[rung]]
name = "worked"
kind = "worked"
[[member]]
name = "a"
"""


class Stage:
    """A folder with the files of a run, and what the stage makes of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        self.made = folder / "runs" / "run" / "questions"
        monkeypatch.chdir(folder)

    def write(self, **files: Iterable[object]) -> None:
        """Write JSONL files, and a configuration that names them."""
        for name, rows in files.items():
            (self._folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = (f'{name} = "{name}.jsonl"' for name in files if name != "train")
        (self._folder / "run.toml").write_text(TOML.format(more="\n".join(named)))

    def run(self) -> int:
        self._patch.setattr(sys, "argv", ["stepladder", "questions", "run.toml"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def audit(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.made / "audit.json").read_text())
        return found


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def problem(name: str, *questions: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    return {"id": name, "problem": text or f"All about {name}.", "questions": list(questions) or [line()]}


def write_problems(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("field", "misspelt", "place"),
    [
        ("answer", "anwser", "questions[1].anwser"),
        ("answer", "Answer", "questions[1].Answer"),
        ("options", "optoins", "questions[1].optoins"),
        ("worked", "workd", "questions[1].workd"),
        ("program", "programme", "questions[1].programme"),
        ("problem", "prolem", "prolem"),
        ("questions", "question", "question"),
        ("source", "souce", "souce"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_misspelt_field_stops_the_reading(
    tmp_path: Path, field: str, misspelt: str, place: str, labelled: bool
) -> None:
    row = problem("two", line(), line(worked="Ann.\nAnn", program="opt(0).")) | {"source": "here"}
    part = row["questions"][1] if field in row["questions"][1] else row
    part[misspelt] = part.pop(field)
    file = write_problems(tmp_path, problem("one"), row)
    with pytest.raises(InputError) as refused:
        read_problems(file, "en", labelled=labelled)
    message = f"{file}:2: field '{place}': unknown field '{misspelt}'; did you mean '{field}'?"
    assert str(refused.value) == message


@pytest.mark.parametrize("name", ["worked", "program"])
def test_a_worked_solution_and_a_program_are_texts(tmp_path: Path, name: str) -> None:
    file = write_problems(tmp_path, problem("one", line(), line(**{name: ["Ann"]})))
    with pytest.raises(InputError) as refused:
        read_problems(file, "en", labelled=True)
    assert str(refused.value) == f"{file}:1: field 'questions[1].{name}': must be a text or null"


def test_fields_of_other_names_are_metadata(tmp_path: Path) -> None:
    more = {"question_id": 1, "answers": ["A"], "answer_text": "Ann", "difficulty": 2, "word": "who", "": None}
    row = problem("one", line(**more)) | {"problem_id": 1, "source_id": "s", "title": "One", "question": "Who?"}
    assert len(read_problems(write_problems(tmp_path, row), "en", labelled=True)[0].questions) == 1


def test_a_problem_is_read_before_the_line_after_it(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [problem("one"), problem("two", line(answer="Z"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = stream_problems(file, "en", labelled=True)
    assert next(problems).id == "one"
    with pytest.raises(InputError, match=":2: "):
        next(problems)


def test_the_splits_are_the_file_in_its_order(stage: Stage) -> None:
    train = [problem(f"p{n * 7 % 40}", line(), line(options=["Cleo", "Dan"], answer="B")) for n in range(40)]
    stage.write(train=train, test=[problem("t2"), problem("t1")])
    assert stage.run() == 0
    problems = read_problems(Path("train.jsonl"), "en", labelled=True)
    held_out = validation_ids([problem.id for problem in problems], 0.15, 0)
    assert len(held_out) == 6
    expected = {
        "train": [q for problem in problems if problem.id not in held_out for q in problem.questions],
        "validation": [q for problem in problems if problem.id in held_out for q in problem.questions],
        "test": [q for p in read_problems(Path("test.jsonl"), "en", labelled=False) for q in p.questions],
    }
    for split, questions in expected.items():
        assert (stage.made / f"{split}.jsonl").read_text() == "".join(records.lines(questions))
    assert stage.audit()["questions"] == {"train": 68, "validation": 12, "test": 2}


def test_findings_come_file_by_file_then_what_the_files_share(stage: Stage) -> None:
    long = " ".join(f"{name} is taller than the {n}th of them." for n, name in enumerate(["Ann", "Bob", "Cleo"] * 5))
    train = [problem("one", text="Same.\\n"), problem("two", text=long), problem("three", text="Same.")]
    test = [problem("four", text="Same."), problem("five", text=f"{long} Now:\\n"), problem("six", line(answer=None))]
    stage.write(train=train, test=test)
    assert stage.run() == 0
    found = stage.audit()
    assert [(finding["kind"], finding["file"], finding["line"]) for finding in found["findings"]] == [
        ("debris", "train.jsonl", 1),
        ("debris", "test.jsonl", 2),
        ("repeated problem", "train.jsonl", 3),
        ("repeated problem", "test.jsonl", 1),
        ("near-duplicate of a test problem", "train.jsonl", 1),
        ("near-duplicate of a test problem", "train.jsonl", 3),
        ("near-duplicate of a test problem", "train.jsonl", 2),
    ]
    assert [*found["counts"].items()] == [
        ("near-duplicate of a test problem", 3),
        ("debris", 2),
        ("repeated problem", 2),
    ]
    assert "not_listed" not in found
    assert found["problems"] == 6


def test_a_worked_solution_that_ends_in_no_option_is_found(stage: Stage) -> None:
    fine = [line(worked="Ann is here.\nAnn"), line(worked="Ann\n"), line(worked=None), line(worked=" "), line()]
    unused = [line(worked="The answer is Ann"), line(worked="Ann\nA"), line(worked="Ann\nAnn.")]
    stage.write(train=[problem("one", *fine), problem("two", *fine[:2], *unused)])
    assert stage.run() == 0
    found = stage.audit()
    assert found["counts"] == {"unused worked solution": 3}
    assert [finding["line"] for finding in found["findings"]] == [2, 2, 2]
    assert found["findings"][0]["message"] == (
        "two#2 has a worked solution that is not used: its last line must be one option's text"
    )


def test_every_worked_solution_of_the_example_is_used(stage: Stage) -> None:
    file = Path(__file__).parent.parent / "examples" / "closedworld" / "train.jsonl"
    stage.write(train=[json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()])
    assert stage.run() == 0
    assert "unused worked solution" not in stage.audit()["counts"]


def test_of_a_kind_found_everywhere_only_the_first_are_listed(stage: Stage) -> None:
    train = [problem(f"p{n}", line(answer="AB"[n % 2]), text="Same.") for n in range(MAX_FINDINGS_LISTED + 6)]
    train[-1] = problem("last", line(options=["Ann", "Ann"], answer="B"))
    stage.write(train=train)
    assert stage.run() == 0
    found = stage.audit()
    assert found["counts"] == {"repeated problem": MAX_FINDINGS_LISTED + 4, "repeated option": 1}
    assert found["not_listed"] == {"repeated problem": 4}
    listed = [finding["line"] for finding in found["findings"] if finding["kind"] == "repeated problem"]
    assert listed == [*range(2, MAX_FINDINGS_LISTED + 2)]
    assert found["findings"][0]["kind"] == "repeated option"


def test_reviews_reach_each_question_and_unknown_ones_stop_the_stage(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [problem(f"p#{n}", line(), line(question="And who else?")) for n in range(4)]
    reviewed = [
        {"id": "p#0#1", "action": "drop"},
        {"id": "p#1#0", "action": "relabel", "answer": "B"},
        {"id": "p#3#0", "action": "keep"},
    ]
    stage.write(train=train, reviewed=reviewed)
    assert stage.run() == 0
    rows = [row for split in ("train", "validation") for row in records.read(stage.made / f"{split}.jsonl", Question)]
    assert {row.id for row in rows} == {f"p#{n}#{m}" for n in range(4) for m in range(2)} - {"p#0#1"}
    assert {row.id: row.answer for row in rows if row.reviewed} == {"p#1#0": "B", "p#3#0": "A"}
    before = {file.name: file.read_bytes() for file in stage.made.iterdir()}
    for unknown in ("p#0#2", "p#9#0", "p#0", ""):
        stage.write(train=train, reviewed=[*reviewed, {"id": unknown, "action": "drop"}, {"id": "p#1#1"}])
        assert stage.run() == 2
        said = capsys.readouterr().err
        assert f"reviewed.jsonl:4: field 'id': {unknown!r} is not the id of a training question" in said
        assert {file.name: file.read_bytes() for file in stage.made.iterdir()} == before


def test_an_id_used_before_stops_the_stage_in_either_file(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    fine, twice = [problem("one"), problem("two")], [problem("one"), problem("two"), problem("one")]
    for train, test, name in ((twice, fine, "train"), (fine, twice, "test")):
        stage.write(train=train, test=test)
        assert stage.run() == 2
        said = capsys.readouterr().err
        assert f"{name}.jsonl:3: field 'id': id 'one' was used on line 1; ids must be unique" in said
        assert not stage.made.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(stage: Stage) -> None:
    stage.write(train=[problem(f"p{n}") for n in range(100)])
    little = "import resource, stepladder.cli as c; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); c.main()"
    command = [sys.executable, "-c", little, "questions", "run.toml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "cannot be written (File too large); free some space, or use another --runs" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not stage.made.exists()


def test_the_contest_is_read_whole(contest: Path) -> None:
    kinds: Counter[str] = Counter()
    questions = 0
    for name, labelled in (("train", True), ("test_unlabelled", False)):
        for problem in read_problems(contest / f"{name}.jsonl", "zh", labelled=labelled):
            questions += len(problem.questions)
            kinds.update(note.kind for _, note in problem.notes)
    assert questions == 1094 + 1328
    assert kinds == {
        "debris": 122, "broken text": 1, "repeated option": 5, "merged options": 3, "empty question": 2,
        "leaked answer": 4,
    }  # fmt: skip
