"""The file of reviewed labels: what people decided about questions, one decision a line, the latest last. Nothing in it
is ever changed: a later line takes an earlier one back, or replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from stepladder import records
from stepladder.errors import InputError
from stepladder.mcq.questionfile import read_questions
from stepladder.mcq.variant import is_variant
from stepladder.records import LETTERS, Language, Question
from stepladder.workspace import digest

Action = Literal["keep", "relabel", "drop", "skip", "undo"]
"""``skip`` decides nothing; ``undo`` takes the same reviewer's last decision about the question back."""


class Review(NamedTuple):
    """What holds for a label."""

    action: Literal["keep", "relabel", "drop"]
    answer: str | None = None


class Decision(NamedTuple):
    """A line of the file."""

    id: str
    """Of the question."""
    action: Action
    answer: str | None = None
    """The right letter, where the action is ``relabel``."""
    reviewer: str = ""
    note: str = ""
    label: str | None = None
    """The label that the reviewer saw."""
    evidence: str | None = None
    """Digest of the question that the reviewer saw (:func:`evidence_of`)."""
    time: float | None = None
    """Seconds since 1970."""
    settles: bool = False
    """Whether it holds although other reviewers decided otherwise."""

    @property
    def review(self) -> Review | None:
        """What it says about the label; None if nothing."""
        if self.action == "skip" or self.action == "undo":  # noqa: PLR1714 (type checkers do not follow "in")
            return None
        return Review(self.action, self.answer)

    def is_stale(self, question: Question) -> bool:
        """Whether the question, as the file has it, is not the one that the reviewer saw. ``question`` has the file's
        own label."""
        is_other = self.evidence is not None and self.evidence != evidence_of(question)
        return is_other or (self.label is not None and self.label != question.answer)


class Standing(NamedTuple):
    """What reviewers think about one question, each by the last decision."""

    by_reviewer: Mapping[str, Decision]
    """Those that decided something."""
    settled: Decision | None
    """The last decision that settles what they disagreed about."""

    @property
    def is_decided(self) -> bool:
        """Whether anybody's decision stands, also where they disagree."""
        return bool(self.by_reviewer) or self.settled is not None

    @property
    def review(self) -> Review | None:
        """What holds; None where nobody decided anything, or they disagree."""
        if self.settled is not None:
            return self.settled.review
        reviews = {decision.review for decision in self.by_reviewer.values()}
        return reviews.pop() if len(reviews) == 1 else None

    @property
    def is_conflict(self) -> bool:
        """Whether they disagree, and nobody has settled it."""
        return self.settled is None and len({decision.review for decision in self.by_reviewer.values()}) > 1


def evidence_of(question: Question) -> str:
    """A digest of what a reviewer sees of a question, but for its label."""
    return digest([question.problem, question.question, question.options])[:16]


def standing(decisions: Iterable[Decision]) -> dict[str, Standing]:
    """What reviewers think, by question id."""
    made: dict[str, dict[str, list[Decision]]] = {}
    settled: dict[str, Decision | None] = {}
    for decision in decisions:
        own = made.setdefault(decision.id, {}).setdefault(decision.reviewer, [])
        if decision.action == "undo":
            taken_back = own.pop() if own else None
            if taken_back is not None and settled.get(decision.id) == taken_back:
                settled[decision.id] = None
        else:
            own.append(decision)
            if decision.settles:
                settled[decision.id] = decision
            elif decision.review is not None:
                settled[decision.id] = None
    return {
        name: Standing(
            {who: own[-1] for who, own in by_reviewer.items() if own and own[-1].review is not None}, settled.get(name)
        )
        for name, by_reviewer in made.items()
    }


def last_of(decisions: Iterable[Decision], reviewer: str) -> Decision | None:
    """A reviewer's last decision that is not taken back; None if there is none."""
    made: list[Decision] = []
    for decision in decisions:
        if decision.reviewer != reviewer:
            continue
        if decision.action != "undo":
            made.append(decision)
        elif (own := next((n for n in range(len(made) - 1, -1, -1) if made[n].id == decision.id), None)) is not None:
            del made[own]
    return made[-1] if made else None


def read_reviews(path: Path, train: Iterable[Path], language: Language) -> tuple[dict[str, Review], dict[str, int]]:
    """Read the reviews of the labels in some training files, by question id; and, by question id as well, the lines of
    decisions that do not hold, since the question was another one when they were made.

    Raises:
        InputError: naming file, line and field; or reviewers disagree.
    """
    numbered = [(number, row) for number, row in _rows(path) if not is_variant(row["id"])]
    questions = {q.id: q for q in read_questions(train, {str(row["id"]) for _, row in numbered}, language)}
    for number, row in numbered:
        if row["id"] not in questions:
            raise InputError(path, f"{row['id']!r} is not the id of a training question", line=number, field="id")
    return _holding(path, numbered, questions)


def read_variant_reviews(path: Path, variants: Mapping[str, Question]) -> dict[str, Review]:
    """The same of questions that models wrote, by id, as far as they are written once more as they were decided about.

    Raises:
        InputError: naming file, line and field; or reviewers disagree.
    """
    numbered = [(number, row) for number, row in _rows(path) if row["id"] in variants]
    return _holding(path, numbered, variants)[0]


def variant_decisions(path: Path) -> list[dict[str, Any]]:
    """What the file says about questions that models wrote.

    Raises:
        InputError: naming file, line and field.
    """
    return [row for _, row in _rows(path) if is_variant(row["id"])]


def _holding(
    path: Path, numbered: Iterable[tuple[int, dict[str, Any]]], questions: Mapping[str, Question]
) -> tuple[dict[str, Review], dict[str, int]]:
    """The reviews that hold, by question id, and the lines of those that do not."""
    fresh: list[Decision] = []
    lines: dict[str, int] = {}
    stale: dict[str, int] = {}
    for number, row in numbered:
        decision = _decision(path, number, row, len(questions[row["id"]].options))
        lines[decision.id] = number
        if decision.is_stale(questions[decision.id]):
            stale[decision.id] = number
        else:
            fresh.append(decision)
    reviews: dict[str, Review] = {}
    for name, found in standing(fresh).items():
        if found.is_conflict:
            who = ", ".join(f"{name or 'one without a name'} ({d.action})" for name, d in found.by_reviewer.items())
            reason = f"{who} disagree about {name}; settle it in 'stepladder view', or by a line with \"settles\": true"
            raise InputError(path, reason, line=lines[name])
        if found.review is not None:
            reviews[name] = found.review
    return reviews, {name: line for name, line in stale.items() if name not in reviews}


def read_decisions(path: Path) -> list[Decision]:
    """All decisions of a file, whatever they are about.

    Raises:
        InputError: naming file, line and field.
    """
    return [_decision(path, number, row, len(LETTERS)) for number, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in records.parse_lines(path):
        question_id = row.get("id") if isinstance(row, dict) else row
        if not isinstance(row, dict) or not isinstance(question_id, str):
            raise InputError(path, f"{question_id!r} is not the id of a training question", line=number, field="id")
        yield number, row


def _decision(path: Path, number: int, row: Mapping[str, Any], options: int) -> Decision:
    """A line's decision; what else it holds is left to its writer."""
    action, answer = row.get("action"), row.get("answer")
    if action not in get_args(Action):
        raise InputError(path, f"{action!r} is not one of keep, relabel, drop", line=number, field="action")
    letters = LETTERS[:options]
    if action == "relabel" and (not isinstance(answer, str) or len(answer) != 1 or answer not in letters):
        raise InputError(path, f"{answer!r} is not one of the letters A to {letters[-1]}", line=number, field="answer")
    for field, kinds in _KINDS.items():
        if row.get(field) is not None and not isinstance(row[field], kinds):
            raise InputError(path, f"{row[field]!r} is not what 'stepladder view' writes", line=number, field=field)
    own = {field: row[field] for field in _KINDS if row.get(field) is not None}
    return Decision(row["id"], cast("Action", action), answer if action == "relabel" else None, **own)


_KINDS: Mapping[str, tuple[type, ...]] = {
    "reviewer": (str,), "note": (str,), "label": (str,), "evidence": (str,), "time": (int, float), "settles": (bool,),
}  # fmt: skip
