"""``stepladder choose-rule``: which rule to trust with votes recorded anywhere."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from stepladder.ensembling.rules import ballot
from stepladder.ensembling.selection import Selection, select
from stepladder.errors import InputError, UserError
from stepladder.mcq.votefile import read_votes
from stepladder.terminal import table


def choose_rule(votes: Path, members: Sequence[str], seed: int, console: Console, *, as_json: bool) -> None:
    """Say which rule to trust with the votes of a file, as a table or as JSON.

    Raises:
        InputError, UserError: as :func:`pool` does.
    """
    found, questions = pool(votes, members, seed)
    if as_json:
        print(to_json(found, questions))
    else:
        show(found, questions, console)


def pool(path: Path, members: Sequence[str], seed: int) -> tuple[Selection, int]:
    """Cross-validate every rule on a votes file; the selection, and how many questions it rests on.

    A question is of the problem that its id names before ``#``. A member's answer is the most frequent of its samples.

    Raises:
        InputError: the file cannot be read, naming line and field, or is of one problem only.
        UserError: members that are too few, named twice or not in the file.
    """
    said, labels = read_votes(path)
    known = sorted({name for votes in said.values() for name in votes})
    if len(members) < 2:
        raise UserError("--members: give at least two, with commas between them")
    for name in members:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0) or known[:3]
            raise UserError(f"--members {name!r}: no votes of it in {path}; did you mean {' or '.join(near)}?")
        if members.count(name) > 1:
            raise UserError(f"--members {name!r} is named twice; name it once, since it has one voice")
    letters = "".join(
        sorted({*labels.values()} | {x for v in said.values() for m in members for x in v.get(m, ()) if x})
    )
    cast = ballot(members, [[votes.get(name, ()) for votes in said.values()] for name in members], letters)
    right = np.array([letters.index(labels[question]) for question in said])
    problems = [question.rpartition("#")[0] or question for question in said]
    if len(set(problems)) < 2:
        raise InputError(path, "holds questions of one problem only; cross-validation needs at least two")
    return select(cast, right, problems, seed), len(right)


def to_json(found: Selection, questions: int) -> str:
    """What was found as JSON."""
    row = {"questions": questions} | found.document().model_dump(mode="json")
    return json.dumps(row, indent=1, ensure_ascii=False)


def show(found: Selection, questions: int, console: Console) -> None:
    """What was found as a table."""
    shown = table(["rule"], ["cross-validated", "95 % interval", "against the best member"])
    alone = found.rules["single"].accuracy
    for name, scored in [*found.rules.items(), ("choosing", found.chosen)]:
        low, high = scored.interval
        shown.add_row(
            name, f"{100 * scored.accuracy:.2f} %", f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * (scored.accuracy - alone):+.2f}", style="bold" if name == found.choice else "",
        )  # fmt: skip
    console.print(shown)
    use = f"one model, {found.leader}" if found.choice == "single" else f"the rule {found.choice}"
    console.print(f"\n{questions:,} questions. Use {use}.", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"At least one member is right on {100 * found.oracle:.1f} %: no rule can do better.", highlight=False
    )
    for first, second, value in found.document().correlation:
        alike = "one of them never errs, or always" if value is None else f"{value:.2f}"
        console.print(
            f"  errors of {first} and {second}: correlation {alike}",
            style="dim",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
