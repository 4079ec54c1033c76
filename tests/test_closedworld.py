"""Closed-world problems: proved, agreed by a second opinion that reads the English text, and the same for ever."""

import json
import re
import time
from collections import Counter
from functools import cache
from hashlib import sha256
from itertools import chain
from random import Random
from typing import Any, NamedTuple

import pytest

from stepladder.closedworld import arithmetic, chaining, ordering, table
from stepladder.closedworld.derive import derive
from stepladder.closedworld.generate import FAMILIES, generate, to_line
from stepladder.closedworld.prove import Unproved, prove
from stepladder.closedworld.rules import Rule
from stepladder.closedworld.untrusted import prove_rules
from stepladder.closedworld.words import LANGUAGES, POOLS
from stepladder.errors import UserError

PROBLEMS = 240

Record = dict[str, Any]


@cache
def records(language: str, split: str = "train", seed: int = 7, problems: int = PROBLEMS) -> tuple[Record, ...]:
    return tuple(generate(seed, problems, language, split))


def questions(*made: Record) -> list[Record]:
    return [question for record in made for question in record["questions"]]


def right(question: Record) -> str:
    return str(question["options"]["ABCD".index(question["answer"])])


# A second opinion: read the English text back with patterns, and ask the family's witness in plain Python.


def reread(record: Record, question: str) -> str:
    family = record["source"].split("/")[1]
    reader = {"chaining": _chaining, "ordering": _ordering, "table": _table, "arithmetic": _arithmetic}[family]
    return reader(record["problem"], question)


class Told(NamedTuple):
    """A chaining problem as its English text tells it."""

    people: dict[str, list[str]]
    links: list[chaining.Link]

    def reach(self, goal: str) -> list[str]:
        return [person for person, facts in self.people.items() if chaining.witness(facts, self.links, goal)]


def _told(story: str) -> Told:
    people = {person: facts.split(" and ") for person, facts in re.findall(r"\b([A-Z]\w+) is ([a-z ]+)\.", story)}
    people.pop("Whoever", None)
    bars = {gives: bar for bar, gives in re.findall(r"Exception: whoever is (\w+) is not (\w+)\.", story)}
    rules = re.findall(r"Whoever is (\w+) is (\w+)\.", story)
    return Told(people, [chaining.Link(needs, bars.get(gives), gives) for needs, gives in rules])


def _chaining(story: str, question: str) -> str:
    told = _told(story)
    asked = re.fullmatch(r"Is (\w+) (\w+)\?", question)
    assert asked is not None
    assert asked[1] in told.people
    return "Yes" if asked[1] in told.reach(asked[2]) else "No"


def _ordering(story: str, question: str) -> str:
    (first,) = re.findall(r"(\w+) is first\.", story)
    line = ordering.witness(first, dict(re.findall(r"(\w+), then (\w+)\.", story)))
    assert len(line) == int(story.split(maxsplit=1)[0])
    if asked := re.fullmatch(r"Is (\w+) ahead of (\w+)\?", question):
        return "Yes" if line.index(asked[1]) < line.index(asked[2]) else "No"
    number = re.search(r"number (\d)", question)
    return line[int(number[1]) - 1] if number else line[-1]


_ROWS = (
    r"(\w+) (?:is in team|takes the|has the) (\w+)(?: bus| key)?\.",
    r"(?:Team|The) (\w+) (?:is from|bus goes to|key opens room) (\w+)\.",
    r"(?:Room )?(\w+) (?:plays on|has|is) (\w+)\.",
)


def _table(story: str, question: str) -> str:
    hops: list[list[tuple[str, str]]] = [[], [], []]
    for sentence in re.findall(r"[^.]+\.", story):
        hop, row = next((i, m) for i, pattern in enumerate(_ROWS) if (m := re.fullmatch(pattern, sentence.strip())))
        hops[hop].append((row[1], row[2]))
    (person,) = (person for person, _ in hops[0] if re.search(rf"\b{person}\b", question))
    return table.witness(person, [tuple(rows) for rows in hops if rows])


def _arithmetic(story: str, question: str) -> str:
    signs = {"adds": 1, "takes": -1}
    buttons = re.findall(r"Button (\w+) (adds|takes) (\d+)\.", story)
    effects = {button: signs[does] * int(number) for button, does, number in buttons}
    (start,) = re.findall(r"The number is (\d+)\.", question)
    presses = re.findall(r"\d ([a-z]+)", question)
    return str(arithmetic.witness(int(start), presses, effects))


def test_every_program_proves_its_own_answer() -> None:
    for question in questions(*records("en"), *records("zh")[:48]):
        assert "ABCD"[prove(question["program"])] == question["answer"]


def test_the_witness_agrees_with_the_proof_on_the_text_alone() -> None:
    for record in records("en"):
        for question in record["questions"]:
            assert reread(record, question["question"]) == right(question), record


def test_records_have_the_shape_of_the_contest() -> None:
    made = records("en")
    assert {record["source"] for record in made} == {
        f"closedworld/{f}/{level}" for f in FAMILIES for level in (1, 2, 3)
    }
    for record in made:
        assert list(record) == ["id", "problem", "source", "questions"]
        assert 2 <= len(record["questions"]) <= 3
        assert json.loads(to_line(record)) == record
        assert to_line(record).endswith("}\n")
        assert to_line(record).count("\n") == 1
        for question in record["questions"]:
            assert list(question) == ["question", "options", "answer", "worked", "program"]


def test_options_are_few_and_all_different_in_both_languages() -> None:
    for question in questions(*records("en"), *records("zh")):
        assert 2 <= len(question["options"]) <= 4
        assert len(set(question["options"])) == len(question["options"])
    counts = Counter(len(question["options"]) for question in questions(*records("en")))
    assert set(counts) == {2, 3, 4}


def test_wrong_options_come_from_named_mistakes() -> None:
    unexplained = 0
    for question in questions(*records("en")):
        reasons = re.findall(r"^opt\(\d\) :- .*  % (.*)$", question["program"], re.MULTILINE)
        assert len(reasons) == len(question["options"])
        assert reasons["ABCD".index(question["answer"])] == "the answer"
        assert reasons.count("the answer") == 1
        if "the other word" in reasons:
            assert set(question["options"]) == {"Yes", "No"}
            unexplained += 1
    assert unexplained < len(questions(*records("en"))) / 20


def test_the_chain_ends_with_the_right_option_and_names_no_letter() -> None:
    for question in questions(*records("en"), *records("zh")):
        lines = question["worked"].split("\n")
        assert len(lines) == 2
        assert lines[1] == right(question)
        assert not re.search(r"\b[A-D]\b", question["worked"])


def test_the_chains_of_all_families() -> None:
    line = (Rule("at(kim,1)"), Rule("behind(ann,bob)"), Rule("behind(kim,ann)"), ordering.FORWARD)
    last = [str(f.atom) for f in derive(line).path("at(bob,3)") if f.atom.match("at", 2)]
    assert last == ["at(kim,1)", "at(ann,2)", "at(bob,3)"]
    shapes = {
        "chaining": r"[A-Z]\w+ is [a-z]+(?: and [a-z]+)?\. (?:[a-z]+ is (?:not )?[a-z]+\. )+[a-z]+: (?:yes|no)\.",
        "ordering": r"\w+(?:, then \w+){2,4}\. 1 \w+(?:, \d \w+){0,4}\.",
        "table": r"[\w ]+\.(?: [\w ]+\.){0,2}",
        "arithmetic": r"(?:\d [a-z]+ (?:adds \d: \d+ \+|takes \d: \d+ -) \d = \d+\. ?){1,3}",
    }
    for record in records("en"):
        for question in record["questions"]:
            assert re.fullmatch(shapes[record["source"].split("/")[1]], question["worked"].split("\n")[0])


def test_a_chain_takes_as_many_steps_as_its_question_needs() -> None:
    for record in records("en"):
        _, family, level = record["source"].split("/")
        for question in record["questions"]:
            steps = question["worked"].split("\n")[0]
            if family == "arithmetic":
                assert re.findall(r"(\d) [a-z]", steps) == [str(n) for n in range(1, int(level) + 1)]
            if family == "ordering":
                walked, counted = steps.removesuffix(".").split(". ")
                line = walked.split(", then ")
                assert len(line) == 2 + int(level)
                places = [f"{n} {person}" for n, person in enumerate(line, 1)]
                asked = [person for person in line if re.search(rf"\b{person}\b", question["question"])]
                needed = max(map(line.index, asked or [right(question)])) + 1
                assert counted == ", ".join(places[:needed])


def test_a_derivation_tells_why_an_atom_fails() -> None:
    rules = [
        Rule("person(eva)"),
        Rule("is(eva,loud)"),
        Rule("is(eva,tall)"),
        Rule("is(P,neat)", ("person(P)", "is(P,loud)", "not is(P,tall)")),
        Rule("is(P,rich)", ("person(P)", "is(P,neat)")),
    ]

    def told(given: list[Rule]) -> list[tuple[str, bool]]:
        path = derive(given).path("is(eva,rich)")
        return [(str(f.atom.arguments[1]), f.holds) for f in path if f.atom.match("is", 2)]

    assert told(rules) == [("loud", True), ("tall", True), ("neat", False), ("rich", False)]
    assert told([r for r in rules if r.head != "is(eva,tall)"]) == [
        ("loud", True),
        ("tall", False),
        ("neat", True),
        ("rich", True),
    ]
    assert told([r for r in rules if r.head != "is(eva,loud)"]) == [("loud", False), ("neat", False), ("rich", False)]


def test_letters_are_near_uniform_for_each_number_of_options() -> None:
    asked = questions(*records("en"), *records("en", "test"))
    for size in (2, 3, 4):
        letters = Counter(question["answer"] for question in asked if len(question["options"]) == size)
        expected = letters.total() / size
        assert set(letters) == set("ABCD"[:size])
        # Four standard deviations of a fair draw.
        assert all(abs(n - expected) < 4 * (expected * (1 - 1 / size)) ** 0.5 for n in letters.values())


def test_yes_and_no_are_balanced() -> None:
    for family in ("chaining", "ordering"):
        made = (record for record in (*records("en"), *records("en", "test")) if family in record["source"])
        answers = Counter(right(question) for question in questions(*made))
        assert answers["Yes"] + answers["No"] > 60
        assert 0.4 < answers["Yes"] / (answers["Yes"] + answers["No"]) < 0.6


def test_the_same_arguments_give_the_same_bytes_for_ever() -> None:
    lines = [to_line(record) for record in generate(7, 36, "en", "train")]
    assert lines == [to_line(record) for record in records("en")[:36]], "asking for more changed the beginning"
    assert lines != [to_line(record) for record in generate(8, 36, "en", "train")]
    digest = sha256("".join(lines).encode()).hexdigest()[:16]
    assert digest == FROZEN, "a seed means other problems than it did: say so in the changelog, then update FROZEN"


FROZEN = "cec95d4b5cf3443e"


def test_splits_share_no_problem_whatever_the_seed_and_nothing_repeats() -> None:
    texts = {split: [record["problem"] for record in records("en", split)] for split in ("train", "test")}
    assert all(len(set(some)) == len(some) for some in texts.values())
    # The family with the fewest worlds: here splits would meet first.
    for split, seed in (("train", 1), ("test", 2)):
        made = generate(seed, 60, "en", split, ["arithmetic"])
        texts[split] += [record["problem"] for record in made]
    assert not set(texts["train"]) & set(texts["test"])

    machines = {
        split: {text[text.index("Button") :] for text in some if "Button" in text} for split, some in texts.items()
    }
    assert not machines["train"] & machines["test"], "the same machine under another name is the same world"


def test_ids_do_not_collide_between_splits_and_languages() -> None:
    made = [*records("en"), *records("zh"), *records("en", "test"), *records("zh", "test", problems=24)]
    assert len({record["id"] for record in made}) == len(made)
    assert all(re.fullmatch(r"(chaining|ordering|table|arithmetic)-[123]-\d{12}", record["id"]) for record in made)


def test_both_languages_tell_the_same_worlds() -> None:
    for english, chinese in zip(records("en"), records("zh"), strict=True):
        assert english["source"] == chinese["source"]
        for one, other in zip(english["questions"], chinese["questions"], strict=True):
            assert (one["program"], one["answer"]) == (other["program"], other["answer"])


def test_programs_are_ascii_and_chinese_is_chinese() -> None:
    for record in records("zh"):
        for question in record["questions"]:
            assert question["program"].isascii()
            shown = "".join([record["problem"], question["question"], question["worked"], *question["options"]])
            assert not re.search(r"[A-Za-z]", shown)
            assert "{" not in shown
    for record in records("en"):
        shown = to_line({**record, "questions": [{**q, "program": ""} for q in record["questions"]]})
        assert shown.isascii()


def test_no_word_stands_for_two_things() -> None:
    assert len(set(chain(*POOLS))) == sum(map(len, POOLS))
    for language in LANGUAGES:
        for pool in POOLS:
            assert len({phrase[language] for phrase in pool.values()}) == len(pool)


def test_texts_are_short() -> None:
    for record in records("en"):
        assert len(record["problem"].split()) <= 50
        for question in record["questions"]:
            assert len(question["worked"].split()) <= 60


def test_numbers_stay_small() -> None:
    made = [record for record in records("en") if "arithmetic" in record["source"]]
    offered = [int(option) for question in questions(*made) for option in question["options"]]
    assert min(offered) > -10  # a careless reader may fall below zero; a right chain never does
    assert max(offered) < 40
    assert not any(re.search(r"= -", question["worked"]) for question in questions(*made))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_world_depends_on_its_draw_only(family: str) -> None:
    for level in (1, 2, 3):
        one, same, other = (FAMILIES[family].build(Random(seed), level) for seed in (5, 5, 6))
        assert (one.rules, one.story) == (same.rules, same.story)
        assert one.story != other.story


def test_unknown_names_and_too_many_problems_are_user_errors() -> None:
    with pytest.raises(UserError, match="language 'fr'"):
        generate(1, 1, "fr", "train")
    with pytest.raises(UserError, match="split 'dev'"):
        generate(1, 1, "en", "dev")
    with pytest.raises(UserError, match="family 'chess'"):
        generate(1, 1, "en", "train", ["table", "chess"])
    with pytest.raises(UserError, match="at least one family"):
        generate(1, 1, "en", "train", [])


GOOD = "p(2). opt(0) :- p(1). opt(1) :- p(2). #show opt/1."

REFUSED = {
    "#script": "#script (python) #end. " + GOOD,
    "#include": '#include "/etc/passwd". ' + GOOD,
    "# include": '# INCLUDE "/etc/passwd". ' + GOOD,
    "ASCII": "p(2). % 中文\n" + GOOD,
    "99999": "p(99999). " + GOOD,
    "0x": "p(0xFFFFFFFF). " + GOOD,
    "integer above": "p(9999*999). " + GOOD,
    "#minimize": "#minimize { 1 }. " + GOOD,
    "0 atoms": "p(2). opt(0) :- p(1). #show opt/1.",
    "2 atoms": "opt(0). opt(1). #show opt/1.",
    "not an opt": "answer(1). #show answer/1.",
    "not the number": "opt(-1). #show opt/1.",
    "no stable model": "a :- not a. " + GOOD,
    "more than one": "opt(0) :- not opt(1). opt(1) :- not opt(0). #show opt/1.",
    "does not occur": "opt(0) :- typo(1). " + GOOD,
    "undefined": "p(1/0). " + GOOD,
    "syntax error": GOOD + " p(",
}


def prove_in_child(program: str, seconds: float, mebibytes: int) -> int:
    return prove_rules("", program, 0, seconds, mebibytes)


def test_a_program_that_proves_one_option_is_accepted_both_ways() -> None:
    assert prove(GOOD) == 1
    assert prove_in_child(GOOD, seconds=10, mebibytes=512) == 1
    # Two stable models that show the same option still prove it.
    assert prove("{a}. opt(0) :- a. opt(0) :- not a. #show opt/1.") == 0


@pytest.mark.parametrize("reason", REFUSED)
def test_a_program_that_does_not_is_refused_with_the_reason(reason: str) -> None:
    with pytest.raises(Unproved, match=re.escape(reason) if reason != "# include" else "(?i)# include"):
        prove(REFUSED[reason])


@pytest.mark.parametrize("reason", ["#include", "2 atoms", "does not occur", "syntax error"])
def test_the_child_refuses_for_the_same_reasons(reason: str) -> None:
    with pytest.raises(Unproved, match=reason):
        prove_in_child(REFUSED[reason], seconds=10, mebibytes=512)


ENDLESS = "p(a). p(f(X)) :- p(X). " + GOOD


def test_endless_grounding_is_stopped_by_the_clock() -> None:
    started = time.monotonic()
    with pytest.raises(Unproved, match=r"stopped by its limits of 0\.5 s"):
        prove_in_child("q(X,Y,Z) :- X=1..999, Y=1..999, Z=1..999. " + GOOD, seconds=0.5, mebibytes=8192)
    assert time.monotonic() - started < 5


def test_endless_grounding_is_stopped_by_its_memory() -> None:
    with pytest.raises(Unproved, match=r"(?i)bad_alloc|memory|limits"):
        prove_in_child(ENDLESS, seconds=20, mebibytes=200)


BASE = "loud(bob). calm(ann). age(bob,7). age(ann,9)."


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("opt(0) :- 9000*9000*9000 < 0. opt(1) :- calm(bob).", "may wrap silently"),
        ("opt(0) :- X = 9000*9000, X*X < 0. opt(1) :- calm(bob).", "may wrap silently"),
        ("opt(0) :- Y = X*X, X = 9000*9000, Y < 0. opt(1) :- calm(bob).", "may wrap silently"),
        ("opt(0) :- S = #sum{X : age(_,X)}, S*S > 0. opt(1) :- calm(bob).", "may wrap silently"),
        ("opt(0) :- #sum{X*X,Y : age(Y,X)} > 0. opt(1) :- calm(bob).", "may wrap silently"),
        ("opt(0) :- loud(bob). opt(1) :- loud(bob), not loud(bob).", "option 1 contradict themselves"),
        ("opt(0) :- loud(bob). opt(1) :- calm(ann), 1 = 2.", "option 1 contradict themselves"),
        ("opt(0) :- loud(bob). opt(1) :- age(bob,X), X < X.", "option 1 contradict themselves"),
        (
            "odd(X) :- age(X,_). opt(0) :- loud(bob). opt(1) :- loud(ann), not odd(ann), odd(ann).",
            "option 1 contradict",
        ),
    ],
)
def test_rules_of_a_hostile_writer_prove_nothing(rules: str, reason: str) -> None:
    with pytest.raises(Unproved, match=reason):
        prove_rules(BASE, rules, 2, seconds=10, mebibytes=512)


@pytest.mark.parametrize(
    "rules",
    [
        "opt(0) :- loud(bob). opt(1) :- loud(ann).",
        "opt(0) :- age(ann,X), age(bob,Y), X > Y. opt(1) :- age(ann,X), age(bob,Y), X < Y.",
        "opt(0) :- age(ann,9). opt(1) :- age(ann,8).",
        "opt(0) :- S = #sum{X,Y : age(Y,X)}, S = 16. opt(1) :- #sum{X,Y : age(Y,X)} = 15.",
        "both(X) :- loud(X), calm(X). opt(0) :- not both(bob). opt(1) :- both(ann).",
        "opt(0) :- age(ann,X), age(bob,Y), X*Y = 63. opt(1) :- age(ann,X), age(bob,Y), X*Y = 49.",
    ],
)
def test_rules_of_an_honest_writer_prove_the_option(rules: str) -> None:
    assert prove_rules(BASE, rules, 2, seconds=10, mebibytes=512) == 0
