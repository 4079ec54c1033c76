"""The content of report.json: plain JSON values in a fixed order, without clock and without paths of this machine.

Durations appear under ``stages`` only, so two runs of the same work differ nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from stepladder.config import Config
from stepladder.mcq.answer import majority
from stepladder.mcq.voting import first_round, is_decided
from stepladder.models import BUNDLED, BUNDLED_FILE
from stepladder.records import Prediction, Question, Sample, parse_lines, read
from stepladder.reporting.measured import BASE, ENSEMBLE, Measured, System, load
from stepladder.stats import accuracy_interval, holm, mcnemar
from stepladder.workspace import MANIFEST

EXAMPLES = 2
"""Example answers shown of each kind, right and wrong."""


class Folder(NamedTuple):
    """An artifact of the run by the names of its stage and part."""

    stage: str
    part: str | None


def collect(run: Path, config: Config, folders: Iterable[Folder]) -> dict[str, Any]:
    """Everything the report says about the finished run in the folder ``run``.

    ``folders`` are the artifacts whose time is reported, in flow order.

    Raises:
        UserError: as :func:`stepladder.reporting.measured.load`.
    """
    choice = _json(run / "ensemble" / "choice.json")
    best = choice["leader"]
    splits = load(run, config, best)
    # The headline is measured on test where that has labels: validation has already been used to choose.
    shown = splits[-1]
    members = [member.name for member in config.member]
    samples = read(run / "samples" / "accepted.jsonl", Sample) + read(run / "samples" / "rejected.jsonl", Sample)
    alone = choice["rule"] == "single" or len(members) == 1
    return {
        "run": {
            "name": config.name,
            "language": config.language,
            "seed": config.seed,
            "base": PurePath(BUNDLED_FILE if config.train.base == BUNDLED else config.train.base).name,
            "members": members,
            "best_member": best,
            "bits": _json(run / "quantised" / best / "verdict.json")["form"]["bits"],
            "votes": config.predict.votes,
            "dtype": {stage: _json(run / stage / best / MANIFEST).get("dtype") for stage in ("adapter", "predictions")},
            "split": shown.split,
        },
        "questions": _json(run / "questions" / "audit.json"),
        "chance": {measured.split: measured.chance for measured in splits},
        "results": [row for measured in splits for row in _results(measured, config.seed)],
        "comparisons": _comparisons(shown, members, None if alone else best),
        "families": [row for measured in splits for row in _broken_down(measured, "family", _family_of)],
        "letters": [row for measured in splits for row in _broken_down(measured, "letter", _letter_of)],
        "cascade": _cascade(run / "samples" / "summary.json", samples),
        "training": [_training(run, member) for member in members],
        "quantisation": [{"member": name} | _json(run / "quantised" / name / "verdict.json") for name in members],
        "ensemble": choice | {"asked": config.ensemble.rule, "alone": alone},
        "voting": _voting(shown, System("quantised", best)),
        "stages": _stages(run, folders, samples),
        "examples": _examples(shown, System("quantised", best)),
    }


def _voting(measured: Measured, system: System) -> list[dict[str, Any]]:
    """What more votes gained and cost: accuracy and tokens a question with at most so many of each question's votes,
    and where all were asked for, what stopping early would have come to. Nothing where there is one vote."""
    answers = measured.answers[system]
    most = max((len(given.votes) for given in answers), default=0)
    if most < 2 or any(len(given.tokens) != len(given.votes) for given in answers):
        return []
    ways = [
        (f"at most {cap}" if cap > 1 else "1 vote", [min(cap, len(given.votes)) for given in answers])
        for cap in range(1, most + 1)
    ]
    if all(len(given.votes) == most for given in answers):
        stops = [next(n for n in range(first_round(most), most + 1) if is_decided(a.votes[:n], most)) for a in answers]
        ways.append(("adaptive", stops))
    return [
        {
            "way": way,
            "votes": sum(counts) / len(counts),
            "tokens": sum(sum(given.tokens[:count]) for given, count in zip(answers, counts, strict=True))
            / len(counts),
            "accuracy": sum(
                majority(given.votes[:count]) == question.answer
                for given, count, question in zip(answers, counts, measured.questions, strict=True)
            )
            / len(counts),
        }
        for way, counts in ways
    ]


def family(source: str) -> str:
    """The family of a question's source: up to the last "/", and short for the built-in ones.

    >>> family("closedworld/ordering/2"), family("contest/round-1"), family("contest")
    ('ordering', 'contest', 'contest')
    """
    return (source.rpartition("/")[0] or source).removeprefix("closedworld/")


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _who(system: System) -> dict[str, str | None]:
    return {"system": system.kind, "member": system.member}


def _results(measured: Measured, seed: int) -> list[dict[str, Any]]:
    problems = [question.problem_id for question in measured.questions]
    rows = []
    for system, right in measured.right.items():
        interval = accuracy_interval(right, problems, seed)
        rows.append(
            _who(system)
            | {"split": measured.split, "n": len(right), "correct": sum(right), "accuracy": measured.accuracy(system)}
            | {"low": interval.low, "high": interval.high}
            | {"unparsed": sum(answer.answer is None for answer in measured.answers[system])}
            | {"lenient": measured.leniently(system)}
        )
    return rows


def _comparisons(measured: Measured, members: list[str], single: str | None) -> list[dict[str, Any]]:
    """Neighbours on the way from base to ensemble, with p-values adjusted for looking at all of them.

    ``single`` is the member the ensemble is held against; None where the ensemble is that member, since a thing is
    not tested against itself.
    """
    pairs = []
    for name in members:
        merged, quantised = System("merged", name), System("quantised", name)
        pairs += [(BASE, merged), (merged, quantised)] if merged in measured.right else [(BASE, quantised)]
    if single is not None:
        pairs.append((System("quantised", single), ENSEMBLE))
    tests = [mcnemar(measured.right[before], measured.right[after]) for before, after in pairs]
    adjusted = holm([test.p for test in tests])
    return [
        {
            "before": _who(before),
            "after": _who(after),
            "split": measured.split,
            "n": len(measured.questions),
            "b": test.lost,
            "c": test.won,
            "p": test.p,
            "p_holm": p_holm,
        }
        for (before, after), test, p_holm in zip(pairs, tests, adjusted, strict=True)
    ]


def _family_of(question: Question) -> str:
    return family(question.source)


def _letter_of(question: Question) -> str:
    return str(question.answer)


def _broken_down(measured: Measured, name: str, key: Callable[[Question], str]) -> list[dict[str, Any]]:
    """Accuracy of every system within the groups that ``key`` makes; ``name`` is the group's JSON key."""
    groups = [key(question) for question in measured.questions]
    rows = []
    for group in sorted(set(groups)):
        for system, right in measured.right.items():
            hits = [hit for hit, member_of in zip(right, groups, strict=True) if member_of == group]
            rows.append(
                {name: group, "split": measured.split}
                | _who(system)
                | {"n": len(hits), "correct": sum(hits), "accuracy": sum(hits) / len(hits)}
            )
    return rows


def _cascade(path: Path, samples: list[Sample]) -> dict[str, Any]:
    # Runs that were sampled by an earlier version have not all of it.
    summary: dict[str, Any] = {"suspect": 0, "positions": [], **_json(path)}
    rungs = [
        {"lenient": 0} | rung | {"dollars": _dollars(sample for sample in samples if sample.rung == rung["name"])}
        for rung in summary["rungs"]
    ]
    return summary | {"rungs": rungs}


def _dollars(samples: Iterable[Sample]) -> float:
    """Money is summed as integers; dollars are only how the sum is shown."""
    return sum(sample.micro_dollars for sample in samples) / 1_000_000


def _training(run: Path, member: str) -> dict[str, Any]:
    steps = [step for _, step in parse_lines(run / "adapter" / member / "log.jsonl")]
    log, validation = ([step for step in steps if key in step] for key in ("loss", "validation_loss"))
    card = _json(run / "trainset" / member / "card.json")
    return {"member": member} | card | {"log": log, "validation": validation}


def _stages(run: Path, folders: Iterable[Folder], samples: list[Sample]) -> list[dict[str, Any]]:
    """Recorded time and money of each artifact. Only asking teachers costs money so far: the student is our own."""
    return [
        {
            "stage": folder.stage,
            "part": folder.part,
            "seconds": _json(run / folder.stage / (folder.part or "") / MANIFEST)["seconds"],
            "dollars": _dollars(samples) if folder.stage == "samples" else 0.0,
        }
        for folder in folders
    ]


class SystemAnswers(NamedTuple):
    """One question, what a system answered, and whether it and the base model were right."""

    question: Question
    given: Prediction
    right: bool
    base_right: bool


def _examples(measured: Measured, system: System) -> list[dict[str, Any]]:
    """Answers worth reading: right ones, those the base model got wrong first, then wrong ones."""
    columns = (measured.questions, measured.answers[system], measured.right[system], measured.right[BASE])
    rows = [SystemAnswers(*row) for row in zip(*columns, strict=True)]
    # Sorting is stable: within the gained and the rest, questions stay in the order of their ids.
    right = sorted((row for row in rows if row.right), key=lambda row: row.base_right)
    wrong = [row for row in rows if not row.right]
    return [
        {
            "id": row.question.id,
            "problem": row.question.problem,
            "question": row.question.question,
            "options": list(row.question.options),
            "label": row.question.answer,
            "answer": row.given.answer,
            "base_right": row.base_right,
            "right": row.right,
            "text": _chain(row.given),
        }
        for chosen in (right, wrong)
        for row in _one_family_each(chosen)[:EXAMPLES]
    ]


def _one_family_each(rows: list[SystemAnswers]) -> list[SystemAnswers]:
    """The same rows, the first of every family up front: two examples of one kind teach less than two kinds."""
    first: dict[str, SystemAnswers] = {}
    for row in rows:
        first.setdefault(family(row.question.source), row)
    return [*first.values(), *(row for row in rows if row is not first[family(row.question.source)])]


def _chain(given: Prediction) -> str:
    """A text that voted for the chosen answer."""
    votes = zip(given.votes, given.texts, strict=True)
    return next((text for vote, text in votes if vote == given.answer), given.texts[0] if given.texts else "")
