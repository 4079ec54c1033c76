"""The content of report.json, from which page and summary are made. It holds no date and no path of this machine.

Durations are only under ``stages``, so two runs of the same work do not differ elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from stepladder.documents import (
    Document,
    EnsembleChoice,
    FinalVerdict,
    PositionBias,
    QuestionAudit,
    RungSummary,
    TrainsetCard,
    Verdict,
)
from stepladder.records import Language, Record

HeldOut = Literal["validation", "test"]
Kind = Literal["base", "merged", "quantised", "ensemble"]
Weights = Literal["chosen", "final"]
"""Whose a figure is: those that learned from the training labels and by which every choice was made, or those that were
trained once more from all labels (``final = "all"``)."""


class Run(Record):
    """The run, and its best member."""

    name: str
    language: Language
    seed: int
    base: str
    members: tuple[str, ...]
    best_member: str
    """Chosen on validation."""
    bits: int
    votes: int
    dtype: Mapping[str, str | None]
    """Number format that the best member was computed in, by stage: ``adapter`` and ``predictions``; None where it is
    not recorded."""
    split: HeldOut
    """The split of the headline: test where it has labels, since choices were made on validation."""


class SystemName(Record):
    """A system that answers; ``member`` is None for base and ensemble."""

    system: Kind
    member: str | None
    weights: Weights = "chosen"


class Result(SystemName):
    """A system's accuracy on one split."""

    split: HeldOut
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    """Limits of the 95 % interval."""
    unparsed: int
    lenient: int
    """Number of right answers if unreadable ones are read leniently."""
    forced: int = 0
    """Number of right answers if unreadable ones are the likeliest letter."""


class Comparison(Record):
    """Two systems on the same questions: exact McNemar test; ``p_holm`` is Holm-adjusted for all rows."""

    before: SystemName
    after: SystemName
    split: HeldOut
    n: int
    b: int
    """Right before, wrong after."""
    c: int
    """Wrong before, right after."""
    p: float
    p_holm: float


class GroupResult(SystemName):
    """A system's accuracy on one group of the questions."""

    split: HeldOut
    n: int
    correct: int
    accuracy: float


class FamilyResult(GroupResult):
    family: str


class LetterResult(GroupResult):
    letter: str


class RungReport(RungSummary):
    dollars: float


class CascadeReport(Record):
    """What each rung solved and cost."""

    rungs: tuple[RungReport, ...]
    questions: int
    unsolved: int
    suspect: int
    positions: tuple[PositionBias, ...]


class TrainingStep(Record):
    """A line of ``log.jsonl``: a training step, or a measurement on validation."""

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class MemberTraining(TrainsetCard):
    """What a member learned from, and its loss."""

    member: str
    log: tuple[TrainingStep, ...]
    validation: tuple[TrainingStep, ...]


class MemberVerdict(Verdict):
    member: str


class FinalMember(FinalVerdict):
    """A member's final weights: what they learned from, beside the chosen ones, and what quantising them cost."""

    member: str
    questions: int
    """Of training and validation, with chains that it learned from."""
    chosen_questions: int
    """Those that the chosen weights learned from."""
    steps: int | None
    """Optimiser steps; None where the trainer kept no log."""
    chosen_steps: int | None


class FinalAnswer(EnsembleChoice):
    """The ensemble's rule, the configured one (``asked``), and whether a single member answers (``alone``)."""

    asked: str
    alone: bool


class VotingPoint(Record):
    """Accuracy and tokens with a number of votes."""

    way: str
    """The name of the point, such as ``at most 3`` or ``adaptive``."""
    votes: float
    """Mean number for a question."""
    tokens: float
    """Mean number for a question."""
    accuracy: float


class StageCost(Record):
    """Time and money that an artifact took."""

    stage: str
    part: str | None
    seconds: float
    dollars: float


class ExampleAnswer(Record):
    """An answer that the report shows in full."""

    id: str
    problem: str
    question: str
    options: tuple[str, ...]
    label: str | None
    answer: str | None
    base_right: bool
    right: bool
    text: str


class Report(Document):
    """Everything the report says."""

    FILE: ClassVar[str] = "report.json"

    run: Run
    questions: QuestionAudit
    chance: Mapping[HeldOut, float]
    """Expected accuracy of guessing, by split."""
    commonest: Mapping[HeldOut, float] = {}
    """Accuracy of naming the letter that is right most often in training, by split."""
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    families: tuple[FamilyResult, ...]
    letters: tuple[LetterResult, ...]
    cascade: CascadeReport
    training: tuple[MemberTraining, ...]
    quantisation: tuple[MemberVerdict, ...]
    ensemble: FinalAnswer
    voting: tuple[VotingPoint, ...]
    stages: tuple[StageCost, ...]
    examples: tuple[ExampleAnswer, ...]
    final: tuple[FinalMember, ...] = ()
    """The final weights, with ``final = "all"``; results and comparisons name them by ``weights``."""
