"""``stepladder choose-rule``: cross-validate the ensemble rules on recorded votes."""

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
from stepladder.terminal import print_table, table


def choose_rule(votes: Path, members: Sequence[str], seed: int, console: Console, *, as_json: bool) -> None:
    """Print the rule to use with the votes of a file, and the scores of all rules, as a table or as JSON.

    Raises:
        InputError, UserError: as :func:`cross_validate`.
    """
    selection, questions = cross_validate(votes, members, seed)
    if as_json:
        print(to_json(selection, questions))
    else:
        show(selection, questions, console)


def cross_validate(path: Path, members: Sequence[str], seed: int) -> tuple[Selection, int]:
    """Cross-validate every rule on a votes file; returns the selection, and the number of questions.

    The part of a question's id before ``#`` is its problem. A member's answer is the most frequent of its samples.

    Raises:
        InputError: the file cannot be read, naming line and field, or holds a single problem.
        UserError: fewer than two members, one named twice, or one that is not in the file.
    """
    by_question, labels = read_votes(path)
    models = sorted({name for votes in by_question.values() for name in votes})
    if len(members) < 2:
        raise UserError("--members: give at least two, separated by commas")
    for name in members:
        if name not in models:
            near = difflib.get_close_matches(name, models, 3, 0) or models[:3]
            raise UserError(f"--members {name!r}: no votes of it in {path}; did you mean {' or '.join(near)}?")
        if members.count(name) > 1:
            raise UserError(f"--members {name!r} is named twice; name it once")
    letters = "".join(
        sorted(
            {*labels.values()}
            | {letter for votes in by_question.values() for name in members for letter in votes.get(name, ()) if letter}
        )
    )
    cast = ballot(members, [[votes.get(name, ()) for votes in by_question.values()] for name in members], letters)
    right = np.array([letters.index(labels[question]) for question in by_question])
    problems = [question.rpartition("#")[0] or question for question in by_question]
    if len(set(problems)) < 2:
        raise InputError(path, "holds questions of one problem only; cross-validation needs at least two problems")
    return select(cast, right, problems, seed), len(right)


def to_json(selection: Selection, questions: int) -> str:
    """A selection as JSON."""
    row = {"questions": questions} | selection.document().model_dump(mode="json")
    return json.dumps(row, indent=1, ensure_ascii=False)


def show(selection: Selection, questions: int, console: Console) -> None:
    """Print a selection as a table."""
    rows = table(["rule"], ["cross-validated", "95 % interval", "against the best member"])
    single = selection.rules["single"].accuracy
    for name, scored in [*selection.rules.items(), ("choosing", selection.chosen)]:
        low, high = scored.interval
        rows.add_row(
            name, f"{100 * scored.accuracy:.2f} %", f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * (scored.accuracy - single):+.2f}", style="bold" if name == selection.choice else "",
        )  # fmt: skip
    print_table(console, rows)
    use = f"one model, {selection.leader}" if selection.choice == "single" else f"the rule {selection.choice}"
    console.print(f"\n{questions:,} questions. Use {use}.", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"At least one member is right on {100 * selection.oracle:.1f} %: no rule can do better.", highlight=False
    )
    for first, second, value in selection.document().correlation:
        correlation = "not defined, since one of them is never or always wrong" if value is None else f"{value:.2f}"
        console.print(
            f"  errors of {first} and {second}: correlation {correlation}",
            style="dim",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
