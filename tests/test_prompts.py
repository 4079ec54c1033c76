"""What a model is shown: packaged templates and a user's, whose examples are near, and in which language it answers."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from stepladder import cli
from stepladder.errors import InputError
from stepladder.mcq.language import is_written_in
from stepladder.mcq.prompts import Solved, ask_messages, fingerprint, variant_messages
from stepladder.mcq.similar import MAX_POOL_TEXTS, nearest
from stepladder.records import Language, Question

TOML = """
name = "run"
language = "en"
prompts = "prompts"

[questions]
train = "train.jsonl"

[models.teacher]
engine = "openai"
base_url = "http://127.0.0.1:9/v1"
price = { input = 0, output = 0 }

[[rung]]
name = "asked"
models = ["teacher"]

[[member]]
name = "a"
"""


def question(number: int = 0, language: Language = "en") -> Question:
    return Question(
        id=f"p#{number}", problem_id="p", problem="Ann is taller than Bob.", question=f"Who is tall, {number}?",
        options=("Ann", "Bob", "Cleo"), answer="A", language=language, source="s",
    )  # fmt: skip


# A user's templates


def test_a_users_template_goes_before_the_packaged_one_of_its_name_only(tmp_path: Path) -> None:
    some, other = tmp_path / "some", tmp_path / "other"
    some.mkdir()
    (some / "system.j2").write_text("Talk like a sailor.\n")
    system, user = ask_messages(question(), (2, 0, 1), some)
    assert system.content == "Talk like a sailor."
    assert user == ask_messages(question(), (2, 0, 1))[1]
    other.mkdir()
    (other / "question.j2").write_text("{% for letter, option in options %}{{ letter }}={{ option }} {% endfor %}")
    (other / "variant.j2").write_text("{{ asked|length }} {{ examples|length }} {{ program }}")
    system, user = ask_messages(question(), (2, 0, 1), other)
    assert system == ask_messages(question(), (2, 0, 1))[0]
    assert user.content == "A=Cleo B=Ann C=Bob"
    (message,) = variant_messages([question(), question(1)], [], "p.", other)
    assert message.content == "2 0 p."


@pytest.mark.parametrize(
    ("name", "text", "place", "said"),
    [
        ("system.j2", "Be brief.\n{% if %}\n", "system.j2:2", "Expected an expression"),
        ("system.j2", "Be brief.\n{{ oops", "system.j2:2", "unexpected"),
        ("question.j2", "{{ problem }}\n\n{{ probelm }}", "question.j2:3", "'probelm' is undefined"),
        ("question.j2", "\n{{ problem + 1 }}", "question.j2:2", "str"),
        ("question.j2", "\n{{ problem|shout }}", "question.j2:2", "No filter named 'shout'"),
        ("question.j2", "\n\n{% include 'part.j2' %}", "part.j2:2", "division by zero"),
        ("question.j2", "\n{% include 'absent.j2' %}", "question.j2:2", "absent.j2"),
    ],
)
def test_a_broken_template_is_one_line_with_its_place(
    tmp_path: Path, name: str, text: str | bytes, place: str, said: str
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "part.j2").write_text("fine\n{{ 1 / 0 }}\n")
    with pytest.raises(InputError) as error:
        ask_messages(question(), (0, 1, 2), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / place}: cannot be rendered (")
    assert said in str(error.value)
    assert str(error.value).endswith("; fix the template")


class Desk:
    """A folder with a configuration that has templates of its own, and the commands run in it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.prompts, self._patch, self._capture = folder / "prompts", patch, capture
        patch.chdir(folder)
        self.prompts.mkdir()
        (folder / "run.toml").write_text(TOML)
        asked = {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"}
        rows = ({"id": f"p{n}", "problem": f"Problem {n}.", "questions": [asked]} for n in range(4))
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and what went to stderr."""
        self._patch.setattr(sys, "argv", ["stepladder", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), self._capture.readouterr().err


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, monkeypatch, capsys)


def test_the_command_line_names_the_line_to_mend(desk: Desk) -> None:
    (desk.prompts / "question.j2").write_text("{{ problem }}\n{{ qestion }}\n")
    assert desk.run("questions", "run.toml") == (0, "")
    reason = "cannot be rendered ('qestion' is undefined); fix the template"
    assert desk.run("samples", "run.toml") == (2, f"error: prompts/question.j2:2: {reason}\n")


def test_a_folder_that_is_none_is_named(desk: Desk) -> None:
    desk.prompts.rmdir()
    code, said = desk.run("questions", "run.toml")
    assert code == 2
    assert said == "error: run.toml: key 'prompts': prompts is not a folder; name one with templates (*.j2)\n"


def test_the_fingerprint_is_of_all_that_may_be_included_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "system.j2").write_text("{% include 'parts/rules.txt' %}")
    (tmp_path / "parts").mkdir()
    part = tmp_path / "parts" / "rules.txt"
    part.write_text("Think.")
    before = fingerprint(tmp_path)
    (tmp_path / ".system.j2.swp").write_bytes(b"\xff")
    assert fingerprint(tmp_path) == before
    part.write_text("Think twice.")
    changed = fingerprint(tmp_path)
    assert changed != before
    part.rename(tmp_path / "rules.txt")
    assert fingerprint(tmp_path) not in {before, changed}


# The prompt of a writer


@pytest.mark.parametrize(
    ("language", "labels"),
    [
        ("en", ("Problem: ", "Question: ", "Reasoning: ", "Answer: ", "Program: ")),
        ("zh", ("题目：", "问题：", "推理：", "答案是：", "程序：")),
    ],
)
def test_a_writer_sees_the_problem_what_was_asked_examples_and_the_form(
    language: Language, labels: tuple[str, ...]
) -> None:
    asked = [question(n, language) for n in range(3)]
    like = question(7, language).model_copy(update={"problem": "Dan is older than Eva.", "options": ("Dan", "Eva")})
    solved = Solved(like, (1, 0), "Dan was born first.\nAnswer: B")
    (message,) = variant_messages(asked, [solved, solved], "taller(ann,bob).", None)
    text = message.content
    problem, stem, reasoning, answer, program = labels
    example = f"{problem}Dan is older than Eva.\n{stem}{like.question}\nA. Eva\nB. Dan\n{reasoning}Dan was born first."
    assert text.count(example) == 2
    assert text.count(f"{problem}Ann is taller than Bob.") == 1
    for one in asked:
        assert f"\n- {one.question}\n" in text
    assert "\ntaller(ann,bob).\n" in text
    form = text[text.rindex(stem) :]
    assert [form.count(label) for label in (stem, reasoning, answer, program)] == [1, 1, 1, 1]
    (without,) = variant_messages(asked, [], None)
    assert program not in without.content
    assert "taller(" not in without.content
    assert without.content.startswith(f"{problem}Ann")


# Examples that are near


def test_the_most_similar_problem_goes_first_and_every_time() -> None:
    dice = random.Random(5)
    words = [f"{a}{b}" for a in ("an", "bo", "cle", "du") for b in ("ra", "ton", "li", "mek")]
    pool = [" ".join(dice.choices(words, k=40)) for _ in range(50)]
    changed = pool[17].split()
    changed[10:13] = ["quite", "other", "words"]
    found = nearest([" ".join(changed), pool[3]], pool, 3, random.Random(1))
    assert [places[0] for places in found] == [17, 3]
    assert all(len(set(places)) == 3 for places in found)
    assert found == nearest([" ".join(changed), pool[3]], pool, 3, random.Random(1))


def test_what_few_texts_say_counts_more_than_what_all_say() -> None:
    common, rare = " ".join(f"c{n} or" for n in range(20)), " ".join(f"r{n} and" for n in range(4))
    pool = [f"{common} " + " ".join(f"x{n}{m} but" for m in range(5)) for n in range(5)]
    pool.append(f"{rare} " + " ".join(f"y{n} so" for n in range(15)))
    assert nearest([f"{common} {rare}"], pool, 1, random.Random(0)) == [[5]]


def test_rounding_errors_put_no_text_before_its_equal() -> None:
    dice = random.Random(1)
    texts = [" ".join(f"w{dice.randrange(300)}" for _ in range(120)) for _ in range(40)]
    pool = [*texts * 10, *texts[:7]]  # the rows that are left over are summed in another order
    found = nearest([f"{text} w1 w2 w3 w4" for text in texts], pool, len(pool), random.Random(2))
    for text in range(40):
        assert len({tuple(at for at in places if at % 40 == text) for places in found}) == 1


def test_texts_like_nothing_and_equal_ones_are_served_in_the_order_drawn() -> None:
    pool = ["one two three four five six seven"] * 9
    strangers = nearest(["nothing of the kind is here"], pool, 9, random.Random(3))
    twins = nearest([pool[0], ""], pool, 9, random.Random(3))
    assert strangers[0] == twins[0] == twins[1]
    assert sorted(twins[0]) == [*range(9)]
    mixed = [*pool, "ten eleven twelve thirteen fourteen", *pool]
    (found,) = nearest(["so ten eleven twelve thirteen"], mixed, 19, random.Random(3))
    (equals,) = nearest([pool[0]], mixed, 19, random.Random(3))
    assert found[0] == 9 == equals[-1]
    assert found[1:] == equals[:-1]


def test_few_or_none_may_be_there_and_of_many_some_are_drawn() -> None:
    assert nearest(["a b c d"], [], 3, random.Random(0)) == [[]]
    assert nearest(["a b c d"], ["a b c d"], 0, random.Random(0)) == [[]]
    assert nearest(["a b c d"], ["x y z w", "a b c d e"], 5, random.Random(0))[0] == [1, 0]
    assert nearest([], ["a"], 5, random.Random(0)) == []
    pool = [f"text number {n} of so many" for n in range(MAX_POOL_TEXTS + 30)]
    (found,) = nearest([pool[0]], pool, len(pool), random.Random(0))
    assert len(found) == len(set(found)) == MAX_POOL_TEXTS


# Languages


@pytest.mark.parametrize(
    ("text", "zh", "en"),
    [
        ("小明比小红高，小红比小刚高，所以小明最高。因此选择第一个人。", True, False),
        ("Ann is taller than Bob, so she is the tallest.", False, True),
        ("设 x = 3，则 f(x) = 9 > 5，所以 max(f(x), 5) = 9。 Ann Bob Cleo.", True, False),
        ("Ann (小安) is taller than Bob, and so Ann is the tallest of all of them.", False, True),
        ("Смит выше Джонса, поэтому он самый высокий из всех.", False, False),
        ("小明比小红高，所以 Смит выше Джонса и всех остальных.", False, False),
        ("スミスさんはジョーンズさんより背が高いです。だから一番です。", False, False),
        ("Ａｎｎ ｉｓ ｔａｌｌｅｒ ｔｈａｎ Ｂｏｂ ａｎｄ Ｅｖａ．", False, True),
        ("Ｘ同学比Ｙ同学高，Ｙ同学比Ｚ同学高，所以Ｘ同学最高，Ｚ同学最矮。", True, False),
        ("甲高", True, True),
        ("It is B.", True, True),
        ("1 + 1 = 2, 2 + 2 = 4, 4 + 4 = 8, 8 + 8 = 16, 16 + 16 = 32", True, True),
        ("", True, True),
    ],
)
def test_which_language_a_chain_is_in(text: str, zh: bool, en: bool) -> None:
    assert (is_written_in(text, "zh"), is_written_in(text, "en")) == (zh, en)
