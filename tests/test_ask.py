"""Identity and ledger: what was answered is kept, and never asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.ask.ledger import Ledger
from stepladder.ask.local.embedded import ask_embedded
from stepladder.ask.request import Request, Response
from stepladder.errors import UserError
from stepladder.models.prefixes import share_prefixes
from stepladder.records import Message


def request(text: str = "hi", max_tokens: int = 8, sample_index: int = 0) -> Request:
    messages = (Message(role="user", content=text),)
    return Request(model="weights", messages=messages, max_tokens=max_tokens, sample_index=sample_index)


class Counting:
    """A transport that answers with the prompt reversed and keeps its own books."""

    def __init__(self, *, finished: bool = True, group: int = 2) -> None:
        self.answered: list[Request] = []
        self.finished = finished
        self.group = group

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        ordered = sorted(requests, key=lambda r: r.key)
        return [list(ordered[at : at + self.group]) for at in range(0, len(ordered), self.group)]

    def answer(self, group: Sequence[Request]) -> list[Response]:
        self.answered += group
        return [
            Response(
                text=r.messages[0].content[::-1],
                finish="stop" if self.finished else "length",
                max_tokens=r.max_tokens,
                prompt_tokens=1,
                completion_tokens=1,
            )
            for r in group
        ]


def test_identity_leaves_the_cap_out_and_keeps_the_rest() -> None:
    assert request().key == request(max_tokens=99).key
    assert len({request().key, request("ho").key, request(sample_index=1).key}) == 3
    assert request().key.startswith("v1:")


def test_identity_is_frozen() -> None:
    """A changed key would buy everything again: change it only together with its version."""
    assert request().key == "v1:6eeb6f0ac8b7a9ffbd6c38bc05f95574b82130d7d1380965d48ca14bc9a63e80"


def test_an_answer_is_asked_once(ledger: Ledger) -> None:
    wanted = [request(text) for text in ("one", "two", "three", "one")]
    transport = Counting()
    first = ask_embedded(wanted, lambda: transport, ledger, "run")
    again = ask_embedded(wanted, lambda: pytest.fail("loaded a model for nothing"), ledger, "run")
    assert ledger.calls("run") == 3
    assert first == again
    assert len(transport.answered) == 3
    assert first[request("two").key].text == "owt"


def test_answers_survive_the_process_that_was_killed_between_groups(tmp_path: Path) -> None:
    wanted = [request(str(number)) for number in range(6)]

    class Dying(Counting):
        def answer(self, group: Sequence[Request]) -> list[Response]:
            if len(self.answered) >= 4:
                raise KeyboardInterrupt
            return super().answer(group)

    with Ledger(tmp_path / "ledger.sqlite") as ledger, pytest.raises(KeyboardInterrupt):
        ask_embedded(wanted, Dying, ledger, "run")
    transport = Counting()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        answers = ask_embedded(wanted, lambda: transport, ledger, "run")
    assert len(answers) == 6
    assert len(transport.answered) == 2


def test_a_cut_answer_serves_its_own_cap_only_and_a_finished_one_any(ledger: Ledger) -> None:
    ask_embedded([request(max_tokens=8)], lambda: Counting(finished=False), ledger, "run")
    assert ledger.find(request(max_tokens=8)) is not None
    assert ledger.find(request(max_tokens=4)) is not None
    assert ledger.find(request(max_tokens=16)) is None
    ask_embedded([request(max_tokens=16)], lambda: Counting(finished=True), ledger, "run")
    found = ledger.find(request(max_tokens=999))
    assert found is not None
    assert found.finished


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_text("not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(UserError, match="not a usable ledger"):
        Ledger(path)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=8))
def test_levels_spell_every_prompt_and_leave_it_a_token_of_its_own(prompts: list[tuple[int, ...]]) -> None:
    common, groups, own = share_prefixes(prompts)
    for i, prompt in enumerate(prompts):
        group = own.parents[i]
        assert common.segments[groups.parents[group]] + groups.segments[group] + own.segments[i] == prompt
        assert own.segments[i]


def test_questions_on_one_problem_share_its_text_and_all_share_the_system_prompt() -> None:
    system, problem = (9, 9, 9, 9), (1, 2, 3, 4)
    prompts = [(*system, *problem, 5, 5), (*system, 7, 7, 7, 7), (*system, *problem, 6, 6)]
    common, groups, own = share_prefixes(prompts)
    assert common.segments == [system]
    assert problem in groups.segments
    assert own.parents[0] == own.parents[2] != own.parents[1]
