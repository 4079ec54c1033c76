"""JSON documents that stages hand on: one object a file, with the file's name in the class.

Rows, of which a file has many, are in :mod:`stepladder.records`. One long list, so that what crosses a stage is seen in
one place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, Literal, Self, TypeVar

from pydantic import ValidationError

from stepladder.errors import InputError
from stepladder.records import Record, Split, read_text
from stepladder.stats import Interval
from stepladder.workspace import write_atomic

T = TypeVar("T")
Direction = Literal["right_to_wrong", "wrong_to_right"]
"""How quantising changed an answer."""
Decision = Literal["lossless enough", "worse", "cannot tell"]
"""Of the test whether quantising lost accuracy."""


class Document(Record):
    """A record that has a file to itself. Fields left at their default are not written."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path, advice: str = "") -> Self:
        """The document in ``folder``. ``advice`` says what to do where it is damaged; by default, run its stage again.

        Raises:
            InputError: naming file and field.
        """
        return cls.read_file(folder / cls.FILE, advice or f"delete {folder} and run its stage again")

    @classmethod
    def read_file(cls, path: Path, advice: str) -> Self:
        """The document in a file of any name, as :meth:`read`."""
        try:
            return cls.model_validate_json(read_text(path))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or None
            problem = first["msg"].removeprefix("Value error, ")
            raise InputError(path, f"{problem}; {advice}", field=field) from None

    def write(self, folder: Path) -> None:
        """Write the document into ``folder``, atomically."""
        write_atomic(folder / self.FILE, self.to_json())

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", exclude_unset=True), indent=1, ensure_ascii=False) + "\n"


class Oddity(Record):
    """Something in the input that is no error but that the user should know."""

    kind: str
    file: str
    line: int
    message: str


class PieceAudit(Document):
    """What is in a piece of a question file, and what is odd about it."""

    FILE: ClassVar[str] = "audit.json"

    problems: int
    questions: Mapping[Split, int]
    letters: Mapping[str, int]
    """Number of questions with each label."""
    counts: Mapping[str, int]
    """Oddities of each kind; of many only the first are listed."""
    findings: tuple[Oddity, ...]


class QuestionAudit(Document):
    """What is in the user's question files, and what is odd about them."""

    FILE: ClassVar[str] = "audit.json"

    problems: int
    questions: Mapping[Split, int]
    reviewed: Mapping[str, int] = {}
    """Number of reviewed labels, by decision."""
    counts: Mapping[str, int]
    """Oddities of each kind, the most frequent first."""
    not_listed: Mapping[str, int] = {}
    """Number of oddities that ``findings`` leaves out, by kind."""
    findings: tuple[Oddity, ...]


class RungSummary(Record):
    """How the samples of a rung were judged. ``asked``, ``solved`` and ``repeated`` count questions, the other fields
    samples."""

    name: str
    kind: str
    asked: int
    """Questions that reached the rung unsolved."""
    solved: int
    repeated: int = 0
    """Questions that it was asked although rungs before it had solved them; they are in neither count above."""
    wrong: int
    unparsed: int
    truncated: int
    lenient: int = 0
    """Samples that only the lenient rule can read; they are rejected like other unreadable ones."""
    flawed: int = 0
    """Right samples that the rung did not accept because of their chains (``clean``)."""


class PositionBias(Record):
    """One model's answers by the letter of the option."""

    model: str
    answers: int
    recall: Mapping[str, float]
    """Share of right answers, by the letter at which the right option was shown; an unreadable answer is not right."""
    chosen: Mapping[str, float]
    """Share of the readable answers that chose each letter."""
    shown: Mapping[str, float]
    """Share of the answers to which the right option was shown at each letter."""
    consistency: float | None
    """Share of pairs of readable answers to one question in two orders that name the same option; None without such
    pairs."""


class SampleSummary(Document):
    """The result of the cascade. Runs of an earlier version lack ``suspect`` and ``positions``."""

    FILE: ClassVar[str] = "summary.json"

    rungs: tuple[RungSummary, ...]
    questions: int
    unsolved: int
    suspect: int = 0
    """Number of labels that are excluded from training because models contradict them."""
    positions: tuple[PositionBias, ...] = ()


class VariantSummary(Document):
    """How many questions models wrote, and how many were accepted or refused."""

    FILE: ClassVar[str] = "summary.json"

    problems: int
    written: int
    accepted: Mapping[str, int]
    """Number of questions by proof."""
    refused: Mapping[str, int]
    """Number of questions by reason."""
    writers: Mapping[str, int]
    """Accepted questions by the model that wrote them."""


class Twin(Record):
    """A training problem that is also in validation or test, in the same or nearly the same words."""

    problem: str
    of: str
    similarity: float


class Lengths(Record):
    """Tokens of a conversation."""

    median: float
    p95: float
    longest: int


class TrainsetCard(Document):
    """What is in a member's trainset, and what was left out of it."""

    FILE: ClassVar[str] = "card.json"

    examples: int
    questions: int
    problems: int
    tokens: int
    length: Lengths
    teachers: Mapping[str, int]
    sources: Mapping[str, int]
    letters: Mapping[str, int]
    """Examples by the letter of the right answer."""
    left_out: int
    """Chains longer than ``max_length`` tokens; they are not in the set, nor are those of the next five counts."""
    leaked: int
    """Chains for problems that are also in validation or test."""
    other_language: int
    """Chains in another language than their question."""
    long_chain: int = 0
    """Chains longer than the member's ``max_chain`` tokens."""
    same_chain: int
    """Chains much like others for the same question, or beyond the member's number of them."""
    duplicates: int
    flawed: Mapping[str, int] = {}
    """Chains that no student should learn from, by flaw (stepladder.mcq.cleaning)."""
    cleaned: Mapping[str, int] = {}
    """Chains in the set from which debris was removed, by its form; a chain may have had several."""
    in_one_order: int = 0
    """Chains of a member with ``orders`` that stayed in their own, because of how they refer to options."""
    twins: tuple[Twin, ...]
    labels: tuple[Split, ...] = ("train",)
    """The splits whose labels it learns from: those of the final weights have validation too."""


class Distance(Document):
    """How far two models' next-token distributions are apart, over all compared completion tokens."""

    FILE: ClassVar[str] = "merge.json"

    tokens: int
    kl: float
    """Mean Kullback-Leibler divergence from the first model to the second, nats a token."""
    same: float
    """Share of tokens for which both models predict the same most likely token."""
    largest: float
    """The largest divergence of a single token, nats."""


class Paired(Record, Generic[T]):
    """A measurement before and after quantising."""

    merged: T
    quantised: T


class FlipCounts(Record):
    """Numbers of validation questions whose answer changed sides by quantising."""

    right_to_wrong: int
    wrong_to_right: int
    p: float
    """Exact McNemar test."""


class AccuracyTest(Record):
    """Whether quantising lost accuracy (quantising/margin.py): a test of non-inferiority on paired answers."""

    decision: Decision
    margin: float
    """``[quantise] max_loss``, share of the accuracy."""
    level: float
    """Most probability that a lossless export is called worse, or one that loses the margin lossless enough."""
    power: float
    """Probability of a decision that ``needed`` stands for."""
    answers: int
    """Pairs of answers, to validation questions in one or more orders of their options."""
    lost: int
    won: int
    loss: float
    """Accuracy lost over these answers."""
    p: float
    """One-sided exact p-value of having lost so much, if nothing is lost."""
    largest_loss: float
    """The smallest margin that is excluded."""
    design_effect: float
    """How many of these answers are worth one independent answer."""
    needed: int | None
    """Answers it takes to decide with probability ``power``; None where the margin is 0, which no number excludes."""


class FlippedAnswer(Record):
    """A question whose answer changed sides by quantising, with the answers before and after."""

    question_id: str
    direction: Direction
    before: str
    after: str


class Flips(FlipCounts):
    examples: tuple[FlippedAnswer, ...]


class QuantisedForm(Record):
    """How weights were quantised."""

    repair: str | None
    """The repair that led to this form; None for the form asked for."""
    bits: int
    group_size: int
    samples: int
    """Most of the member's own conversations that calibrated."""
    layers_in_8_bits: tuple[str, ...]


class AttemptSummary(QuantisedForm):
    """A form that was tried, with its main measurements."""

    quantised: float
    flips: FlipCounts
    unparsed: float
    kl: float | None
    rounding_kl: float | None
    bytes: int
    why: tuple[str, ...]


class NumberFormats(Record):
    """The number formats of training, quantising and measuring; None where it is not recorded."""

    trained: str | None
    quantised: str
    measured: str


class VerdictHead(Record):
    form: QuantisedForm
    dtype: NumberFormats


class Measurement(Record):
    """What one quantised form costs, measured in pairs on the validation questions."""

    merged: float
    """Accuracy."""
    quantised: float
    intervals: Paired[Interval]
    loss: float
    """Accuracy lost."""
    n: int
    flips: Flips
    unparsed: Paired[float]
    """Share of the answers without a readable letter."""
    tokens: Paired[float]
    """Mean length of an answer."""
    accuracy: AccuracyTest | None = None
    """Whether accuracy was lost; None in verdicts of an earlier version, which held ``loss`` against ``max_loss``."""
    distance: Distance | None
    """Between the merged and the quantised model, on answers of the former; None where there are none."""
    rounding_kl: float | None
    """KL divergence, nats a token, that plain rounding into the same form costs."""
    bytes: Paired[int]
    why: tuple[str, ...]
    """The limits of ``[quantise]`` that are exceeded, as sentences; empty where the form passes."""


class Verdict(Measurement, VerdictHead, Document):
    """What quantising a member cost, with all attempts."""

    FILE: ClassVar[str] = "verdict.json"

    passed: bool
    gates: Mapping[str, float]
    attempts: tuple[AttemptSummary, ...]


class FinalMeasurement(Record):
    """What one quantised form of final weights costs. Their validation labels trained them, so nothing here is an
    accuracy: it is held against the same figures of the chosen weights, whose accuracy was measured."""

    n: int
    """Validation questions that both answered."""
    unparsed: Paired[float]
    """Share of the answers without a readable letter."""
    tokens: Paired[float]
    """Mean length of an answer."""
    distance: Distance | None
    """Between the merged and the quantised model, on answers of the former; None where there are none."""
    rounding_kl: float | None
    """KL divergence, nats a token, that plain rounding into the same form costs."""
    bytes: Paired[int]
    chosen_unparsed: float
    """Share of unreadable answers of the chosen quantised weights."""
    chosen_kl: float | None
    """Mean KL divergence of the chosen quantised weights from their merged ones, nats a token."""
    why: tuple[str, ...]
    """The limits that are exceeded, as sentences; empty where the form passes."""


class FinalVerdict(FinalMeasurement, VerdictHead, Document):
    """What quantising final weights cost, in the form that was chosen."""

    FILE: ClassVar[str] = "verdict.json"

    passed: bool
    gates: Mapping[str, float]


class RuleScore(Record):
    """Accuracy of an ensemble rule on questions that it was not fitted on, with its 95 % interval."""

    accuracy: float
    low: float
    high: float


class CrossValidation(Record):
    """Every ensemble rule and the choice among them, cross-validated (ensembling/selection.py)."""

    rules: Mapping[str, RuleScore]
    chosen: RuleScore
    """The whole procedure: choose a rule, then use it."""
    choice: str
    """The rule to use, chosen from all questions."""
    leader: str
    """The best member on all questions."""
    oracle: float
    """Share of the questions that at least one member answers rightly: no rule can do better."""
    correlation: tuple[tuple[str, str, float | None], ...]
    """Pearson correlation of the errors of each pair of members; None where one of them is never or always wrong."""


class EnsembleChoice(Document):
    """The ensemble rule of the run, and the members it uses."""

    FILE: ClassVar[str] = "choice.json"

    rule: str
    leader: str
    members: tuple[str, ...]
    validation: CrossValidation | None
    """None where there are too few problems to choose by."""

    @property
    def answering(self) -> tuple[str, ...]:
        """The members whose answers count: one where it answers alone."""
        return (self.leader,) if self.rule == "single" else self.members


class GgufSystem(Record):
    """One of the forms of a member that a GGUF file is compared with, or the file."""

    accuracy: float
    interval: Interval
    bytes: int
    """Of the weights."""


class GgufVerdict(Document):
    """What a GGUF file of a member answers through llama.cpp's server, beside its merged and quantised weights: the
    same validation questions, in pairs."""

    FILE: ClassVar[str] = "gguf.json"

    member: str
    kind: str
    """llama.cpp's name of the quantisation, such as ``q8_0``."""
    file: str
    llama_cpp: str = ""
    """Its version."""
    weights: Literal["chosen", "final"]
    """Final ones learned from the validation labels, so what they answer is compared but is no accuracy."""
    n: int
    merged: GgufSystem
    quantised: GgufSystem
    gguf: GgufSystem
    flips: Flips
    """Between merged weights and file."""
    unparsed: Paired[float]
    """Share of the answers without a readable letter; ``quantised`` is the file's."""
    accuracy: AccuracyTest
    """Whether the file lost accuracy."""
    other_tokens: int = 0
    """Validation prompts that llama.cpp splits into other tokens than the student was trained on."""
    tokens: float
    """Mean length of the file's answers, tokens."""
    tokens_per_second: float | None
    """That the server wrote, all answers together; None where the ledger had them all."""
