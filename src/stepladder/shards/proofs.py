"""Which programs that models wrote prove their writer's answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.closedworld.prove import Stopped, Unproved
from stepladder.closedworld.untrusted import prove_rules
from stepladder.records import LETTERS

PROVED = "proved.json"
"""File of a result: the ids of the questions whose answer is proved."""
MAX_SOLVER_SECONDS, MAX_SOLVER_MIB = 10, 512
"""For one program."""
MAX_STOPPED = 20
"""Programs of one writer in a piece that may run into those limits; then no more of them are tried."""


class Program(NamedTuple):
    """A program and what it is to prove."""

    question_id: str
    writer: str
    base: str
    """The facts of the problem."""
    rules: str
    """The writer's."""
    options: int
    answer: str | None
    """The writer's letter."""


def proofs(order: Mapping[str, Any], result: Path) -> None:
    """Try the ``programs`` of a piece."""
    proved, stopped = [], Counter[str]()
    for program in (Program(*fields) for fields in order["programs"]):
        if stopped[program.writer] >= MAX_STOPPED:
            continue
        try:
            option = prove_rules(program.base, program.rules, program.options, MAX_SOLVER_SECONDS, MAX_SOLVER_MIB)
        except Stopped:
            stopped[program.writer] += 1
        except Unproved:
            pass
        else:
            if LETTERS[option : option + 1] == program.answer:
                proved.append(program.question_id)
    (result / PROVED).write_text(json.dumps(proved), encoding="utf-8")
