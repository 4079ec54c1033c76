"""Computes the content of the report from the files of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from stepladder.config import Config
from stepladder.context import FINAL
from stepladder.documents import EnsembleChoice, FinalVerdict, QuestionAudit, SampleSummary, TrainsetCard, Verdict
from stepladder.mcq.answer import majority
from stepladder.mcq.position import commonest_letters, unread_accuracy
from stepladder.mcq.voting import first_round, is_decided
from stepladder.models import BUNDLED, BUNDLED_FILE
from stepladder.records import Prediction, Question, Sample, read, stream
from stepladder.reporting import costs
from stepladder.reporting.content import (
    CascadeReport,
    Comparison,
    ExampleAnswer,
    FamilyResult,
    FinalAnswer,
    FinalMember,
    GroupResult,
    LetterResult,
    MemberTraining,
    MemberVerdict,
    Report,
    Result,
    Run,
    RungReport,
    TrainingStep,
    VotingPoint,
)
from stepladder.reporting.measured import BASE, ENSEMBLE, FINAL_ENSEMBLE, Measured, System, load
from stepladder.stats import accuracy_interval, holm, mcnemar
from stepladder.workspace import read_manifest

MAX_EXAMPLES = 2
"""Example answers of each kind, right and wrong."""


def collect(run: Path, config: Config, folders: Iterable[costs.Folder]) -> Report:
    """The content of the report on the finished run in the folder ``run``.

    ``folders`` are the artifacts whose time is reported, in flow order.

    Raises:
        UserError: as :func:`stepladder.reporting.measured.load`.
        InputError: a file of the run cannot be read.
    """
    choice = EnsembleChoice.read(run / "ensemble")
    best = choice.leader
    final = choice.answering if config.final == "all" else ()
    splits = load(run, config, best, final)
    headline = splits[-1]
    members = tuple(member.name for member in config.member)
    verdicts = {member: Verdict.read(run / "quantised" / member) for member in members}
    samples = read(run / "samples" / "accepted.jsonl", Sample) + read(run / "samples" / "rejected.jsonl", Sample)
    alone = choice.rule == "single" or len(members) == 1
    letters = commonest_letters(stream(run / "questions" / "train.jsonl", Question))
    return Report(
        run=Run(
            name=config.name,
            language=config.language,
            seed=config.seed,
            base=PurePath(BUNDLED_FILE if config.train.base == BUNDLED else config.train.base).name,
            members=members,
            best_member=best,
            bits=verdicts[best].form.bits,
            votes=config.predict.votes,
            dtype={stage: _number_format(run / stage / best) for stage in ("adapter", "predictions")},
            split=headline.split,
        ),
        questions=QuestionAudit.read(run / "questions"),
        chance={measured.split: measured.chance for measured in splits},
        commonest={measured.split: unread_accuracy(letters, measured.questions) for measured in splits},
        results=tuple(row for measured in splits for row in _results(measured, config.seed)),
        comparisons=tuple(_comparisons(headline, members, None if alone else best)),
        families=tuple(row for measured in splits for row in _families(measured)),
        letters=tuple(row for measured in splits for row in _letters(measured)),
        cascade=_cascade(SampleSummary.read(run / "samples"), samples),
        training=tuple(_training(run, member) for member in members),
        quantisation=tuple(MemberVerdict(member=name, **dict(verdict)) for name, verdict in verdicts.items()),
        ensemble=FinalAnswer(**dict(choice), asked=config.ensemble.rule, alone=alone),
        voting=tuple(_voting(headline, System("quantised", best))),
        stages=tuple(costs.stages(run, folders)),
        examples=tuple(_examples(headline, System("quantised", best))),
        **({"final": tuple(_final(run, name) for name in final)} if final else {}),
    )


def _final(run: Path, member: str) -> FinalMember:
    """A member's final weights beside its chosen ones."""
    chosen, final = _training(run, member), _training(run / FINAL, member)
    return FinalMember(
        member=member,
        questions=final.questions,
        chosen_questions=chosen.questions,
        steps=final.log[-1].step if final.log else None,
        chosen_steps=chosen.log[-1].step if chosen.log else None,
        **dict(FinalVerdict.read(run / FINAL / "quantised" / member)),
    )


def _number_format(folder: Path) -> str | None:
    """The number format that an artifact was computed in; None where it is not recorded, or there is no artifact."""
    return read_manifest(folder).get("dtype") if folder.exists() else None


def _voting(measured: Measured, system: System) -> list[VotingPoint]:
    """Accuracy and tokens with only the first votes of each question, from one up to all of them. Where all questions
    have all their votes, also with adaptive stopping. Empty where there is one vote a question."""
    answers = measured.answers[system]
    most = max((len(row.votes) for row in answers), default=0)
    if most < 2 or any(len(row.tokens) != len(row.votes) for row in answers):
        return []
    ways = [
        (f"at most {cap}" if cap > 1 else "1 vote", [min(cap, len(row.votes)) for row in answers])
        for cap in range(1, most + 1)
    ]
    if all(len(row.votes) == most for row in answers):
        caps = range(first_round(most), most + 1)
        stops = [next(cap for cap in caps if is_decided(row.votes[:cap], most)) for row in answers]
        ways.append(("adaptive", stops))
    return [
        VotingPoint(
            way=way,
            votes=sum(counts) / len(counts),
            tokens=sum(sum(row.tokens[:count]) for row, count in zip(answers, counts, strict=True)) / len(counts),
            accuracy=sum(
                majority(row.votes[:count]) == question.answer
                for row, count, question in zip(answers, counts, measured.questions, strict=True)
            )
            / len(counts),
        )
        for way, counts in ways
    ]


def family(source: str) -> str:
    """The family of a question's source: the part before the last "/", without ``closedworld/``.

    >>> family("closedworld/ordering/2"), family("contest/round-1"), family("contest")
    ('ordering', 'contest', 'contest')
    """
    return (source.rpartition("/")[0] or source).removeprefix("closedworld/")


def _results(measured: Measured, seed: int) -> Iterator[Result]:
    problems = [question.problem_id for question in measured.questions]
    for system, right in measured.right.items():
        interval = accuracy_interval(right, problems, seed)
        yield Result(
            **system.fields,
            split=measured.split,
            n=len(right),
            correct=sum(right),
            accuracy=measured.accuracy(system),
            low=interval.low,
            high=interval.high,
            unparsed=sum(answer.answer is None for answer in measured.answers[system]),
            lenient=measured.leniently(system),
            forced=measured.forced(system),
        )


def _comparisons(measured: Measured, members: Sequence[str], single: str | None) -> list[Comparison]:
    """Each step from base to ensemble, and from chosen to final weights, as a comparison, with p-values adjusted for
    their number.

    ``single`` is the member that the ensemble is compared with; None where the ensemble is that member alone.
    """
    pairs = []
    for name in members:
        merged, quantised = System("merged", name), System("quantised", name)
        pairs += [(BASE, merged), (merged, quantised)] if merged in measured.right else [(BASE, quantised)]
    if single is not None:
        pairs.append((System("quantised", single), ENSEMBLE))
    if FINAL_ENSEMBLE in measured.right:
        pairs.append((ENSEMBLE, FINAL_ENSEMBLE))
    tests = [mcnemar(measured.right[before], measured.right[after]) for before, after in pairs]
    adjusted = holm([test.p for test in tests])
    return [
        Comparison(
            before=before.label,
            after=after.label,
            split=measured.split,
            n=len(measured.questions),
            b=test.lost,
            c=test.won,
            p=test.p,
            p_holm=p_holm,
        )
        for (before, after), test, p_holm in zip(pairs, tests, adjusted, strict=True)
    ]


def _families(measured: Measured) -> Iterator[FamilyResult]:
    for group, result in _broken_down(measured, lambda question: family(question.source)):
        yield FamilyResult(family=group, **result.model_dump(exclude_unset=True))


def _letters(measured: Measured) -> Iterator[LetterResult]:
    for group, result in _broken_down(measured, lambda question: str(question.answer)):
        yield LetterResult(letter=group, **result.model_dump(exclude_unset=True))


def _broken_down(measured: Measured, key: Callable[[Question], str]) -> Iterator[tuple[str, GroupResult]]:
    """Accuracy of every system on each group of questions with the same ``key``."""
    groups = [key(question) for question in measured.questions]
    for group in sorted(set(groups)):
        for system, right in measured.right.items():
            hits = [hit for hit, its_group in zip(right, groups, strict=True) if its_group == group]
            yield (
                group,
                GroupResult(
                    **system.fields,
                    split=measured.split,
                    n=len(hits),
                    correct=sum(hits),
                    accuracy=sum(hits) / len(hits),
                ),
            )


def _cascade(summary: SampleSummary, samples: Sequence[Sample]) -> CascadeReport:
    return CascadeReport(
        rungs=tuple(
            RungReport(**dict(rung), dollars=costs.dollars(sample for sample in samples if sample.rung == rung.name))
            for rung in summary.rungs
        ),
        questions=summary.questions,
        unsolved=summary.unsolved,
        suspect=summary.suspect,
        positions=summary.positions,
    )


def _training(run: Path, member: str) -> MemberTraining:
    log = run / "adapter" / member / "log.jsonl"
    steps = read(log, TrainingStep) if log.exists() else []  # there is none of a finished member
    card = TrainsetCard.read(run / "trainset" / member)
    return MemberTraining(
        member=member,
        **card.model_dump(exclude_unset=True),
        log=tuple(step for step in steps if step.loss is not None),
        validation=tuple(step for step in steps if step.validation_loss is not None),
    )


class SystemAnswers(NamedTuple):
    """One question, what a system answered, and whether it and the base model were right."""

    question: Question
    prediction: Prediction
    right: bool
    base_right: bool


def _examples(measured: Measured, system: System) -> list[ExampleAnswer]:
    """Answers to show: right ones, first those that the base got wrong, then wrong ones."""
    columns = (measured.questions, measured.answers[system], measured.right[system], measured.right[BASE])
    rows = [SystemAnswers(*row) for row in zip(*columns, strict=True)]
    # Sorting is stable, so questions that are equal here stay in the order of their ids.
    right = sorted((row for row in rows if row.right), key=lambda row: row.base_right)
    wrong = [row for row in rows if not row.right]
    return [
        ExampleAnswer(
            id=row.question.id,
            problem=row.question.problem,
            question=row.question.question,
            options=row.question.options,
            label=row.question.answer,
            answer=row.prediction.answer,
            base_right=row.base_right,
            right=row.right,
            text=_chain(row.prediction),
        )
        for chosen in (right, wrong)
        for row in _one_family_each(chosen)[:MAX_EXAMPLES]
    ]


def _one_family_each(rows: list[SystemAnswers]) -> list[SystemAnswers]:
    """The rows, reordered: the first of every family comes first, since two families show more than one."""
    first: dict[str, SystemAnswers] = {}
    for row in rows:
        first.setdefault(family(row.question.source), row)
    return [*first.values(), *(row for row in rows if row is not first[family(row.question.source)])]


def _chain(prediction: Prediction) -> str:
    """The first text that voted for the answer; without one, the first text."""
    votes = zip(prediction.votes, prediction.texts, strict=True)
    first = prediction.texts[0] if prediction.texts else ""
    return next((text for vote, text in votes if vote == prediction.answer), first)
