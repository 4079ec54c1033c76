"""A member's training chains: what is kept, what is left out and why, and the card that says so."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stepladder import models
from stepladder.config import Config, Member, Model, Price, Questions, Rung, Train, Variants
from stepladder.context import Context
from stepladder.errors import UserError
from stepladder.mcq.answer import ANSWER_LINE, strict, with_final_line
from stepladder.mcq.balance import balanced
from stepladder.mcq.chains import most_different
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.shuffle import fixed, shown, to_original, to_shown
from stepladder.models import template
from stepladder.progress import Progress
from stepladder.records import LETTERS, Example, Language, Question, Record, Sample, lines, read
from stepladder.shards.each import Piece
from stepladder.stages import adapter, flow, trainset
from stepladder.training.fit import Fit
from stepladder.training.sequences import TokenRow
from stepladder.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = (("an", "bo", "cle", "du", "e", "fi"), ("ra", "ton", "li", "mek", "so", "v"))
WORDS = [a + b for a in PARTS[0] for b in PARTS[1]]
ZH = "因为安比鲍勃高，鲍勃比克莱奥高，所以安最高，其他人都不是。"


def text(seed: object, words: int = 40) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


def question(name: str, problem: str | None = None, options: Iterable[str] = ("Ann", "Bob", "Cleo")) -> Question:
    told = text(name) if problem is None else problem
    return Question(
        id=f"{name}#0", problem_id=name, problem=told, question=f"Who is it, going by {text(name, 5)}?",
        options=tuple(options), answer="A", language="en", source="exam/1" if name < "t5" else "exam/2",
    )  # fmt: skip


def sample(asked: Question, chain: str = "", index: int = 0, **more: Any) -> Sample:
    return Sample.model_validate(
        {
            "question_id": asked.id, "rung": "easy", "model": "m1", "sample_index": index, "key": f"v1:{index}",
            "permutation": tuple(range(len(asked.options))), "answer": asked.answer, "verdict": "accepted",
            "text": f"{chain or text((asked.id, index), 30)}\nAnswer: {asked.answer}",
        }
        | more
    )  # fmt: skip


TRAIN = [question(f"t{n}") for n in range(10)]
SAME = TRAIN[1].model_copy(
    update={"id": "v1#0", "problem_id": "v1", "problem": TRAIN[1].problem.replace(" ", "  "), "answer": "B",
            "options": ("Cleo", "Ann", "Bob")}
)  # fmt: skip
NEAR = TRAIN[2].model_copy(
    update={"id": "x1#0", "problem_id": "x1", "problem": TRAIN[2].problem.replace(TRAIN[2].problem[40:60], "quite so ")}
)
FIRST = text("first", 50)
CHAINS = (FIRST, f"{FIRST} too", text("second", 50), f"{text('second', 50)[:150]} {text('end', 15)}")
"""Four chains of one question: the second repeats the first, the last says half of what the third does."""
SAMPLES = [
    *(sample(asked) for asked in TRAIN if asked.id != "t3#0"),
    *(sample(TRAIN[3], chain, at) for at, chain in enumerate(CHAINS)),
    sample(TRAIN[4], ZH, 1),
    sample(TRAIN[5], index=1, model="m2", rung="hard", permutation=(2, 0, 1), text="Ann it is.\n**Answer: B. Ann**\n"),
    sample(TRAIN[6], index=1, model="m2", rung="hard", text=sample(TRAIN[6]).text),
    sample(TRAIN[7], text("long", 3000), 1),
]
VARIANTS = [
    asked.model_copy(
        update={"id": f"{asked.problem_id}~m1-0", "question": f"Who else, {asked.id}?", "source": "variant/m1"}
    )
    for asked in TRAIN[:5]
]
MEMBERS = (
    Member(name="all"),
    Member(name="few", chains=2),
    Member(name="even", balance=True),
    Member(name="more", variants=True, control="all"),
    Member(name="hard", teachers=("hard",)),
    Member(name="some", share=0.4, seed=3, variants=True),
)


class Made(NamedTuple):
    """One member's set."""

    folder: Path
    examples: list[Example]
    card: dict[str, Any]

    def ids(self) -> Counter[str]:
        return Counter(example.question_id for example in self.examples)


class Run:
    """A run up to the trainsets, whose questions and chains are written by hand."""

    def __init__(self, folder: Path) -> None:
        (folder / "train.jsonl").write_text("{}")
        (folder / "prompts").mkdir()
        self.config = Config(
            name="tiny",
            language="en",
            prompts=folder / "prompts",
            questions=Questions(train=str(folder / "train.jsonl")),
            models={"m1": api("m1"), "m2": api("m2")},
            rung=(Rung(name="easy", models=("m1",)), Rung(name="hard", models=("m2",))),
            variants=Variants(models=("m1",), agree=1),
            train=Train(max_length=1024),
            member=MEMBERS,
        )
        self.context = Context(self.config, Workspace(folder / "runs", "tiny"), Progress(Console(file=StringIO())))
        self.put("questions", {"train": TRAIN, "validation": [question("v0"), SAME], "test": [question("x0"), NEAR]})
        self.put("samples", {"accepted": SAMPLES})
        self.put("variants", {"questions": VARIANTS, "accepted": [sample(q, model="m1") for q in VARIANTS]})

    def put(self, stage: str, rows: Mapping[str, Iterable[Record]]) -> None:
        """A finished artifact with these files."""
        with flow.stage(stage).artifact(self.context, None).writing() as folder:
            for name, content in rows.items():
                (folder / f"{name}.jsonl").write_text("".join(lines(content)), encoding="utf-8")

    def states(self) -> dict[str, str]:
        stage = flow.stage("trainset")
        return {member.name: stage.artifact(self.context, member.name).state() for member in MEMBERS}

    def made(self, member: str) -> Made:
        folder = self.context.input("trainset", member)
        return Made(folder, read(folder / "train.jsonl", Example), json.loads((folder / "card.json").read_text()))


def api(name: str) -> Model:
    return Model(
        engine="openai",
        base_url=("http://127.0.0.1:9/v1",),
        model=name,
        price=Price.model_validate({"input": 0, "output": 0}),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"))
    flow.run(run.context, ("trainset",))
    return run


def test_nothing_of_validation_or_test_is_learned_whatever_its_wording(run: Run) -> None:
    for member, leaked in (("all", 2), ("few", 2), ("even", 2), ("more", 4), ("hard", 0)):
        made = run.made(member)
        assert not {"t1#0", "t2#0", "t1~m1-0", "t2~m1-0"} & {*made.ids()}
        assert made.card["leaked"] == leaked
    same, near = run.made("all").card["twins"]
    assert same == {"problem": "t1", "of": "v1", "similarity": 1.0}
    assert (near["problem"], near["of"]) == ("t2", "x1")
    assert 0.25 < near["similarity"] < 1


def test_many_pieces_leave_out_what_one_does(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainset, "PIECE_BYTES", 1000)
    started: set[str] = set()
    command = Piece.command

    def noted(piece: Piece) -> list[str]:
        started.add(piece.log.name.partition("-")[0])
        return command(piece)

    monkeypatch.setattr(Piece, "command", noted)
    again = Run(tmp_path)
    with flow.stage("trainset").artifact(again.context, "all").writing() as folder:
        flow.stage("trainset").build(again.context, "all", folder)
    assert started == {"shared_texts", "pairs"}
    for name in ("train.jsonl", "card.json"):
        one, many = (made.made("all").folder / name for made in (run, again))
        assert one.read_bytes() == many.read_bytes()


def test_a_member_with_nothing_to_learn_from_is_an_error_that_says_why(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.put("samples", {"accepted": [next(sample for sample in SAMPLES if sample.question_id == "t1#0")]})
    expected = (
        "member 'all' has nothing to learn from: 1 of 1 accepted chains are in its mix; 1 left out because their "
        "problem is, wholly or nearly, one of validation or test; widen"
    )
    with pytest.raises(UserError, match=expected):
        flow.run(run.context, ("trainset",))
    assert run.states()["all"] == "missing"


def test_a_chain_in_another_language_teaches_nobody(run: Run) -> None:
    made = run.made("all")
    assert made.card["other_language"] == 1
    assert made.ids()["t4#0"] == 1
    assert not any("因为" in example.messages[-1].content for example in made.examples)


def test_what_is_too_long_or_there_already_is_counted(run: Run) -> None:
    made = run.made("all")
    assert (made.card["left_out"], made.card["duplicates"]) == (1, 1)
    assert made.ids()["t6#0"] == made.ids()["t7#0"] == 1


def test_of_many_chains_the_most_different_are_kept(run: Run) -> None:
    def kept(member: str) -> list[str]:
        said = (
            e.messages[-1].content.rpartition("\n")[0] for e in run.made(member).examples if e.question_id == "t3#0"
        )
        return [*said]

    assert kept("all") == [*CHAINS]
    assert kept("few") == [CHAINS[0], CHAINS[2]]
    assert run.made("all").card["same_chain"] == 0
    few = run.made("few").card
    assert few["same_chain"] == 3  # two chains here, and the copy in another place
    assert few["duplicates"] == 0


def rebuilt(run: Run, member: Member) -> Made:
    """What ``all`` gets with other settings."""
    stage, config = flow.stage("trainset"), run.config.model_copy(update={"member": (member,)})
    context = replace(run.context, config=config)
    with stage.artifact(context, "all").writing() as folder:
        stage.build(context, "all", folder)
    return run.made("all")


def test_debris_is_removed_and_flawed_chains_are_left_out_unless_the_member_says_otherwise(tmp_path: Path) -> None:
    run, chain = Run(tmp_path), text("clean", 30)
    said = (f"Assistant: <thinking>{chain}</thinking>\nAnswer: A", "<output>Answer: A</output>")
    run.put("samples", {"accepted": [sample(TRAIN[0], index=index, text=words) for index, words in enumerate(said)]})
    made = {is_clean: rebuilt(run, Member(name="all", clean=is_clean)) for is_clean in (True, False)}
    assert [example.messages[-1].content for example in made[True].examples] == [f"{chain}\nAnswer: A"]
    assert made[True].card["flawed"] == {"no reasoning": 1}
    assert made[True].card["cleaned"] == {"role": 1, "tag": 1}
    assert [example.messages[-1].content for example in made[False].examples] == [said[0], "Answer: A"]
    assert (made[False].card["flawed"], made[False].card["cleaned"]) == ({}, {})


def test_the_shortest_chains_are_learned_in_several_orders(tmp_path: Path) -> None:
    run, size = Run(tmp_path), len(TRAIN[0].options)
    said = (text("long", 30), text("short", 10), f"{text('letters', 15)} So B is out.", text("longest", 40))
    accepted = [sample(TRAIN[0], index=index, text=f"{words}\nAnswer: A") for index, words in enumerate(said)]
    run.put("samples", {"accepted": accepted})
    made = rebuilt(run, Member(name="all", chains=2, choose="shortest", orders=size))
    answers = [example.messages[-1].content for example in made.examples]
    assert Counter(answer.rpartition("\n")[0] for answer in answers) == {said[1]: size, said[2]: 1}
    assert {answer[-1] for answer in answers} == set("ABC"[:size])
    assert (made.card["same_chain"], made.card["in_one_order"]) == (2, 1)
    readme = (made.folder / "README.md").read_text(encoding="utf-8")
    assert f"Orders of options a chain: {size} (1 chains in their own only)" in readme


@pytest.mark.parametrize(("choose", "kept"), [("likely", [1, 3]), ("fitting", [0, 1])])
def test_chains_that_fit_the_base_are_learned(
    choose: Any, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    said = [f"{text(word, 12)}\nAnswer: A" for word in ("first", "second", "third", "fourth", "fifth")]
    too_long = f"{text('sixth', 2000)}\nAnswer: A"
    accepted = [sample(TRAIN[0], index=index, text=words) for index, words in enumerate((*said, too_long))]
    run.put("samples", {"accepted": [*accepted, sample(TRAIN[3], text=said[0])]})
    measured = [Fit(2.0, 2.0), Fit(0.5, 1.0), Fit(2.0, 9.0), Fit(0.1, 1.0), Fit(1.0, 3.0)]

    def fits(folder: Path, rows: list[TokenRow], *_: object) -> list[Fit]:
        assert (folder, len(rows)) == (models.locate("bundled"), len(measured))  # one chain is too long to learn
        return measured

    monkeypatch.setattr(trainset, "fits", fits)
    made = rebuilt(run, Member(name="all", chains=2, choose=choose))
    answers = [example.messages[-1].content for example in made.examples if example.question_id == TRAIN[0].id]
    assert sorted(map(said.index, answers)) == kept
    assert len(made.examples) == 3  # a question with few chains is not measured
    assert made.card["same_chain"] == 4


def test_a_member_may_learn_letters_alone(tmp_path: Path) -> None:
    run, size = Run(tmp_path), len(TRAIN[0].options)
    said = [f"{text(word, 12)}\nAnswer: A" for word in ("first", "second")]
    run.put("samples", {"accepted": [sample(TRAIN[0], index=index, text=words) for index, words in enumerate(said)]})
    made = rebuilt(run, Member(name="all", learns="letters"))
    assert [example.messages[-1].content for example in made.examples] == ["Answer: A"]
    assert made.card["same_chain"] == 1
    assert "Letters only, without the chains" in (made.folder / "README.md").read_text("utf-8")
    ordered = rebuilt(run, Member(name="all", learns="letters", orders=size)).examples
    assert {example.messages[-1].content for example in ordered} == {f"Answer: {letter}" for letter in "ABC"[:size]}
    with pytest.raises(ValueError, match="leave choose out"):
        Member(name="all", learns="letters", choose="shortest")
    letters = run.config.model_copy(update={"member": (Member(name="all", learns="letters"),)})
    held_out = adapter._held_out(replace(run.context, config=letters), "all", [TRAIN[3]])
    assert [example.messages[-1].content for example in held_out] == [f"Answer: {TRAIN[3].answer}"]


def test_a_member_learns_no_chain_above_its_number_of_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run = Run(tmp_path)
    said = [f"{text('short', 10)}\nAnswer: A", f"{text('long', 60)}\nAnswer: A"]
    run.put("samples", {"accepted": [sample(TRAIN[0], index=index, text=words) for index, words in enumerate(said)]})
    lengths = [len(tokenizer.encode(words)) for words in said]
    made = rebuilt(run, Member(name="all", max_chain=lengths[0]))
    assert [example.messages[-1].content for example in made.examples] == said[:1]
    assert made.card["long_chain"] == 1
    assert "1 because the chain is longer than `max_chain` tokens" in (made.folder / "README.md").read_text("utf-8")
    assert len(rebuilt(run, Member(name="all", max_chain=lengths[1])).examples) == 2


def test_variants_are_learned_only_where_the_member_says_so(run: Run) -> None:
    mine = {question.id for question in VARIANTS}
    assert {*run.made("more").ids()} & mine == {"t0~m1-0", "t3~m1-0", "t4~m1-0"}
    for member in ("all", "few", "even", "hard"):
        assert not {*run.made(member).ids()} & mine
    assert run.made("more").card["sources"]["variant/m1"] == 3
    assert {*run.made("hard").ids()} == {"t5#0", "t6#0"}
    some = {name.partition("#")[0].partition("~")[0] for name in run.made("some").ids()}
    assert len(some) <= 4
    assert {name for name in run.made("some").ids() if "~" in name} == {
        f"{p}~m1-0" for p in some if p in {"t0", "t3", "t4"}
    }


def test_what_is_trained_is_what_was_asked_and_ends_in_the_right_letter(run: Run) -> None:
    asked = {question.id: question for question in (*TRAIN, *VARIANTS)}
    for member in MEMBERS:
        for example in run.made(member.name).examples:
            *prompt, answer = example.messages
            question = asked[example.question_id]
            options = re.findall(r"^[A-Z]\. (.*)$", prompt[-1].content, re.MULTILINE)
            order = tuple(question.options.index(option) for option in options)
            assert tuple(prompt) == ask_messages(question, order)
            letter = strict(answer.content, options).letter
            assert letter is not None
            assert to_original(letter, order) == question.answer
            assert answer.content.endswith(f"\nAnswer: {letter}")
    assert [e.messages[-1].content[-1] for e in run.made("all").examples if e.teacher == "m2"] == ["B"]


def test_letters_are_balanced_where_the_member_says_so(run: Run) -> None:
    assert {*run.made("all").card["letters"]} == {"A", "B"}
    letters = run.made("even").card["letters"]
    assert {*letters} == {"A", "B", "C"}
    assert max(letters.values()) - min(letters.values()) <= 1


# The card


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(models.locate("bundled"))


@pytest.mark.parametrize("member", [member.name for member in MEMBERS])
def test_the_card_counts_what_is_there(run: Run, tokenizer: PreTrainedTokenizerBase, member: str) -> None:
    made = run.made(member)
    card, mix = made.card, next(one for one in MEMBERS if one.name == member)
    asked = {question.id: question for question in (*TRAIN, *VARIANTS)}
    lengths = sorted(sum(map(len, template.conversation_tokens(tokenizer, e.messages))) for e in made.examples)
    assert card["examples"] == len(made.examples)
    assert card["questions"] == len(made.ids())
    assert card["problems"] == len({asked[name].problem_id for name in made.ids()})
    assert card["tokens"] == sum(lengths)
    assert card["length"]["longest"] == lengths[-1]
    assert lengths[0] <= card["length"]["median"] <= card["length"]["p95"] <= lengths[-1]
    assert card["teachers"] == Counter(example.teacher for example in made.examples)
    assert card["sources"] == Counter(asked[example.question_id].source for example in made.examples)
    assert card["letters"] == Counter(example.messages[-1].content[-1] for example in made.examples)
    if mix.share == 1:
        taught = [one for one in SAMPLES if not mix.teachers or {one.model, one.rung} & {*mix.teachers}]
        total = len(taught) + mix.variants * len(VARIANTS)
        out = ("left_out", "leaked", "other_language", "same_chain", "duplicates")
        assert card["examples"] + sum(card[reason] for reason in out) == total


def table(readme: str, title: str) -> dict[str, int]:
    """A table of the card, as counts by name; the shares are looked at on the way."""
    _, _, rest = readme.partition(f"| {title} | Conversations | Share |\n|---|---:|---:|\n")
    rows = [line.strip("| ").split(" | ") for line in rest.partition("\n\n")[0].splitlines()]
    counts = {name: int(count) for name, count, _ in rows}
    for name, _, share in rows:
        assert share == f"{100 * counts[name] / sum(counts.values()):.1f} %"
    return counts


@pytest.mark.parametrize("member", [member.name for member in MEMBERS])
def test_the_readme_says_what_the_card_does(run: Run, member: str) -> None:
    made = run.made(member)
    card, readme = made.card, (made.folder / "README.md").read_text(encoding="utf-8")
    _, head, body = readme.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "language": ["en"],
        "task_categories": ["question-answering"],
        "tags": ["multiple-choice", "chain-of-thought", "stepladder"],
        "size_categories": ["n<1K"],
    }
    assert f"# Training chains of member {member}, run tiny\n" in body
    counted = f"{card['examples']} conversations on {card['questions']} questions about {card['problems']} problems, "
    assert f"\n{counted}{card['tokens']:,} tokens of the student `bundled`; " in body
    assert table(body, "Teacher") == card["teachers"]
    assert table(body, "Source") == card["sources"]
    assert table(body, "Right letter") == card["letters"]
    left = dict.fromkeys(("left_out", "leaked", "other_language", "same_chain", "duplicates"), 0)
    section = body.partition("## Left out\n")[2].partition("\n\n")[0]
    assert sorted(int(line.split()[1]) for line in section.splitlines() if line[0] == "-") == sorted(
        card[reason] for reason in left if card[reason]
    )
    assert (section == "Nothing.") == (not any(card[reason] for reason in left))
    assert "- `t1` and `v1`: similarity 1.00\n- `t2` and `x1`: similarity 0." in body
    mix = next(one for one in MEMBERS if one.name == member)
    assert f"Proved variants: {'yes' if mix.variants else 'no'}." in body
    assert f"Answer letters balanced: {'yes' if mix.balance else 'no'}." in body


# Fresh and stale


def test_only_what_hangs_on_a_change_is_made_again(run: Run) -> None:
    fresh = dict.fromkeys((member.name for member in MEMBERS), "done")
    assert run.states() == fresh
    run.put("variants", {"questions": VARIANTS[:1], "accepted": [sample(VARIANTS[0], model="m1")]})
    assert run.states() == fresh | {"more": "stale", "some": "stale"}
    run.put("variants", {"questions": VARIANTS, "accepted": [sample(q, model="m1") for q in VARIANTS]})
    assert run.states() == fresh
    added = run.config.prompts / "system.j2" if run.config.prompts else Path()
    added.write_text("Think.")
    try:
        assert set(run.states().values()) == {"stale"}
    finally:
        added.unlink()
    assert run.states() == fresh


# Chains


@given(st.lists(st.text("abc ", max_size=40), max_size=8), st.integers(1, 9))
def test_chains_that_are_kept_are_few_distinct_and_led_by_the_first(texts: list[str], count: int) -> None:
    kept = most_different(texts, count)
    assert kept == sorted(set(kept))
    assert len(kept) <= min(count, len(texts))
    assert kept[:1] == [0][: len(texts)]
    assert len({texts[at] for at in kept}) == len(kept)


def test_the_one_least_like_those_taken_goes_next() -> None:
    far, near = text("far"), text("near")
    texts = [near, f"{near[:180]} {text('a', 9)}", far, near, f"{far[:90]} {text('b', 20)}"]
    assert [most_different(texts, count) for count in (1, 2, 3, 4, 5)] == [
        [0], [0, 2], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 4],
    ]  # fmt: skip


# Letters

OPTIONS = ("Ann", "Bob", "Cleo", "Dan", "Eva", "Fay")
LAST = {"en": "none of the above", "zh": "以上都不是"}
SAID: Mapping[Language, tuple[tuple[str, bool], ...]] = {
    "en": (
        ("Ann is taller than Bob.", True),
        ("", True),
        ("Who is tall is not short; see step 2.", True),
        ("B is out, since Bob is short.", False),
        ("So (b) is out.", False),
        ("The second option is out.", False),
        ("Ａ does not follow.", False),
    ),
    "zh": (
        ("安比鲍勃高。", True),
        ("选项B不对。", True),
        ("选项B和A不对。", False),
        ("第二个选项不对。", False),
        ("选项二不对。", False),
    ),
}
"""What chains say before their answer line, and whether that stays right in another order."""


class Asked(NamedTuple):
    """A question, a chain for it, and the letters at which the answer may be shown."""

    question: Question
    sample: Sample
    letters: set[str]


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    language: Language = draw(st.sampled_from(("en", "zh")))
    size = draw(st.integers(2, 5))
    options = tuple(draw(st.permutations(OPTIONS))[:size])
    if draw(st.booleans()) and size > 2:
        options = (*options[:-1], LAST[language])
    right = draw(st.integers(0, size - 1))
    worked = draw(st.booleans())
    question = Question(
        id=f"q{draw(st.integers(0, 99))}", problem_id="p", problem="P.", question="Who?", options=options,
        answer=LETTERS[right], language=language, source="s", worked=f"It is so.\n{options[right]}" if worked else None,
    )  # fmt: skip
    places = fixed(question).places
    free = draw(st.permutations([at for at in range(size) if at not in places]))
    order = (*free, *sorted(places))
    letter = to_shown(LETTERS[right], order)
    said, follows = draw(st.sampled_from(SAID[language]))
    line = draw(st.sampled_from((ANSWER_LINE[language], "**Answer: {}**", "最终答案是：{}", "<answer>{}</answer>")))
    chain = worked_solution(question, order) if worked else f"{said}\n{line.format(letter)}"
    key = "worked:1" if worked else "v1:1"
    made = sample(question, permutation=order, text=chain, key=key)
    may_move = (follows or worked) and right not in places
    return Asked(question, made, {LETTERS[at] for at in range(size) if at not in places} if may_move else {letter})


@given(st.lists(asked(), max_size=30))
def test_balanced_chains_are_right_and_letters_as_even_as_they_can_be(drawn: list[Asked]) -> None:
    moved = balanced([(one.question, one.sample) for one in drawn])
    counts: dict[int, Counter[str]] = {}
    at = []
    for (question, before, letters), after in zip(drawn, moved, strict=True):
        options = shown(question.options, after.permutation)
        assert sorted(after.permutation) == [*range(len(options))]
        assert all(after.permutation[place] == place for place in fixed(question).places)
        letter = strict(with_final_line(after.text, options, question.language), options).letter
        assert letter in letters
        assert to_original(str(letter), after.permutation) == question.answer == after.answer
        if after.permutation == before.permutation:
            assert after == before
        elif question.worked:
            assert after.text == worked_solution(question, after.permutation)
        counts.setdefault(len(options), Counter())[str(letter)] += 1
        at.append(letter)
    for (question, _, letters), letter in zip(drawn, at, strict=True):
        used = counts[len(question.options)]
        assert used[str(letter)] - min(used[other] for other in letters) <= 1


def test_those_that_cannot_move_are_evened_out_by_those_that_can() -> None:
    question = Question(
        id="q", problem_id="p", problem="P.", question="Who?", options=("Ann", "Bob"), answer="A", language="en",
        source="s",
    )  # fmt: skip
    chains = [sample(question, "Ann is tall.", at) for at in range(4)]
    chains += [sample(question, "Since A is right.", at) for at in range(4)]
    assert [one.permutation for one in balanced([(question, chain) for chain in chains])] == [(1, 0)] * 4 + [(0, 1)] * 4
