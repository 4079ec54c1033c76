"""samples: the cascade. Each rung answers what is still unsolved; accepted and rejected chains are both kept.

Where training stops early by its loss, validation questions climb too. Their accepted chains are written apart from the
others, train no member and are in no count. For the final weights the validation questions climb alone, and what was
asked before is found in the ledger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

from stepladder import records
from stepladder.answering.cascade import WORKED, Cascade, Step
from stepladder.answering.client import identity
from stepladder.config import Rung, settings
from stepladder.context import Context
from stepladder.documents import QuestionAudit, RungSummary, SampleSummary
from stepladder.mcq.answer import lenient
from stepladder.mcq.labels import Suspect, weigh
from stepladder.mcq.position import Positions
from stepladder.mcq.shuffle import shown
from stepladder.records import Question, Sample, SampleVerdict
from stepladder.workspace import Artifact, file_digest, write_atomic

CHUNK_QUESTIONS = 10_000
"""Questions that climb the ladder together; a limit, so that memory does not grow with the number of questions."""
JUDGED = ".judged.jsonl"
"""Temporary file of all samples, until it is known which labels are suspect. A line is + (the rung accepts it) or -,
then the sample."""
VALIDATION_ACCEPTED, VALIDATION_REJECTED = "validation_accepted.jsonl", "validation_rejected.jsonl"
"""Samples of validation questions. Both were paid for, so both are kept."""
COUNTS = ("asked", "solved", "repeated", "wrong", "unparsed", "truncated", "lenient", "flawed")


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    models = sorted({model for rung in config.rung for model in rung.models})
    inputs = {"questions": context.digest_of("questions")} | context.prompts_of(models)
    inputs |= {f"model {name}": identity(config, name) for name in models}
    inputs |= {f"chains of {rung.name}": file_digest(rung.chains) for rung in config.rung if rung.chains is not None}
    rungs: dict[str, Any] = {"seed": config.seed, "rungs": [settings(rung) for rung in config.rung]}
    if _asks_held_out(context):
        rungs["validation"] = True
    if context.is_final:
        rungs["split"] = context.taught[-1]
    return Artifact(context.input("samples"), rungs, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    counts, votes = RungCounts(context.config.rung), Votes()
    cascade = Cascade(context)
    held_out = held_out_questions(context)
    training = records.stream(context.input("questions") / f"{context.taught[-1]}.jsonl", Question)
    questions = chain(training, held_out.values())
    total = QuestionAudit.read(context.input("questions")).questions[context.taught[-1]] + len(held_out)
    done = 0
    held_out_samples: list[tuple[Sample, bool]] = []
    with (folder / JUDGED).open("w", encoding="utf-8") as file:
        while chunk := sorted(islice(questions, CHUNK_QUESTIONS), key=lambda question: question.id):
            by_id = {question.id: question for question in chunk}
            judged: list[tuple[Sample, bool]] = []
            waiting = held_out.keys() & by_id.keys()
            for every in cascade.climb(chunk):
                accepted = {_identity(sample) for sample in every.accepted}
                held_out_samples += (
                    (sample, _identity(sample) in accepted)
                    for sample in every.samples
                    if sample.question_id in held_out
                )
                step = _without(every, held_out.keys(), len(waiting))
                waiting -= every.solved
                judged += ((sample, _identity(sample) in accepted) for sample in step.samples)
                row = counts.add(step, by_id)
                if done + len(chunk) == total:
                    again = f"; {row.repeated:,} solved ones asked once more" if row.repeated else ""
                    context.progress.say(f"rung {row.name}: {row.solved:,} of {row.asked:,} questions solved{again}")
                else:
                    context.progress.update(f"rung {row.name}, question", done, total)
            done += len(chunk)
            by_id = {name: question for name, question in by_id.items() if name not in held_out}
            votes.add(by_id, [sample for sample, _ in judged])
            judged.sort(key=lambda pair: _identity(pair[0]))
            file.writelines(
                f"{'+' if is_accepted else '-'}{sample.model_dump_json()}\n" for sample, is_accepted in judged
            )
    for rung in context.config.rung:
        if rung.chains is not None and not counts.samples_of(rung):
            context.progress.say(
                f"rung {rung.name}: {rung.chains} has no chain for a {_kind(context)} question; compare the ids"
            )
    if _asks_held_out(context):
        held_out_samples.sort(key=lambda pair: _identity(pair[0]))
        for name, accepted_ones in ((VALIDATION_ACCEPTED, True), (VALIDATION_REJECTED, False)):
            chosen = (sample for sample, is_accepted in held_out_samples if is_accepted == accepted_ones)
            write_atomic(folder / name, records.lines(chosen))
    suspects = votes.suspects()
    if suspects:
        path = context.input("samples") / "audit.jsonl"
        context.progress.say(f"{len(suspects)} disputed labels excluded from training: {path}")
    write_atomic(folder / "audit.jsonl", _audit(suspects, (sample for sample, _ in _judged(folder))))
    trusted_rungs = {rung.name for rung in context.config.rung if rung.trust_majority}
    suspect_ids = {suspect.id for suspect in suspects}
    for name, accepted_ones in (("accepted", True), ("rejected", False)):
        samples = (
            sample
            for sample, is_accepted in _judged(folder)
            if (is_accepted and (sample.rung in trusted_rungs or sample.question_id not in suspect_ids))
            == accepted_ones
        )
        write_atomic(folder / f"{name}.jsonl", records.lines(samples))
    (folder / JUDGED).unlink()
    rows = counts.rows()
    SampleSummary(
        rungs=rows,
        questions=rows[0].asked,
        unsolved=rows[0].asked - sum(row.solved for row in rows),
        suspect=len(suspects),
        positions=tuple(positions.bias(model) for model, positions in sorted(counts.positions.items())),
    ).write(folder)


def held_out_questions(context: Context) -> dict[str, Question]:
    """Validation questions that the ladder is asked beside the training questions, by id: those without a worked
    solution, where training needs chains for them."""
    if not _asks_held_out(context):
        return {}
    questions = records.stream(context.input("questions") / "validation.jsonl", Question)
    return {question.id: question for question in questions if question.worked is None}


def _asks_held_out(context: Context) -> bool:
    """Whether training is measured on chains of validation questions; final weights are not."""
    return context.config.train.asks_validation and not context.is_final


def _kind(context: Context) -> str:
    """What the questions that climb are called in messages."""
    return "validation" if context.is_final else "training"


def _without(step: Step, ids: Collection[str], reached: int) -> Step:
    """A rung's result without some questions, so many of which had reached it."""
    samples, accepted = (
        [sample for sample in part if sample.question_id not in ids] for part in (step.samples, step.accepted)
    )
    return step._replace(reached=step.reached - reached, samples=samples, accepted=accepted)


def _identity(sample: Sample) -> tuple[str, str, str, int]:
    return sample.question_id, sample.rung, sample.model, sample.sample_index


def _judged(folder: Path) -> Iterator[tuple[Sample, bool]]:
    """The samples of the temporary file, and whether their rung accepts them."""
    with (folder / JUDGED).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Sample.model_validate_json(line[1:]), line[0] == "+"


class RungCounts:
    """Counts of questions and samples by rung, and of answers by position."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self.positions: dict[str, Positions] = {}
        self._counts: dict[Rung, Counter[str]] = {rung: Counter() for rung in rungs}

    def rows(self) -> tuple[RungSummary, ...]:
        """The counts of every rung so far."""
        return tuple(map(self._row, self._counts))

    def samples_of(self, rung: Rung) -> int:
        """Number of the rung's samples so far."""
        return sum(self._counts[rung][verdict] for verdict in get_args(SampleVerdict))

    def _row(self, rung: Rung) -> RungSummary:
        counts = {name: self._counts[rung][name] for name in COUNTS}
        return RungSummary(name=rung.name, kind=rung.kind, **counts)

    def add(self, step: Step, questions: dict[str, Question]) -> RungSummary:
        """Count one rung's samples of some questions and return its counts so far."""
        counts = self._counts[step.rung]
        counts["asked"] += step.reached
        counts["solved"] += len(step.solved)
        counts["repeated"] += len(step.solved_before)
        counts.update(sample.verdict for sample in step.samples)
        counts["flawed"] += sum(sample.key in step.flawed for sample in step.samples)
        answers: dict[tuple[str, str], list[Sample]] = {}
        for sample in step.samples:
            if sample.answer is None:
                options = shown(questions[sample.question_id].options, sample.permutation)
                counts["lenient"] += lenient(sample.text, options).letter is not None
            if sample.model != WORKED:
                answers.setdefault((sample.model, sample.question_id), []).append(sample)
        for (model, question_id), answered in answers.items():
            self.positions.setdefault(model, Positions()).add(questions[question_id], answered)
        return self._row(step.rung)


class Votes:
    """The models' votes on the training questions, for finding suspect labels."""

    def __init__(self) -> None:
        self._votes: dict[str, dict[str, list[str | None]]] = {}
        self._labels: dict[str, str] = {}
        self._right: dict[str, set[str | None]] = {}
        """Letters that were judged right: the label, and any other option with the same text."""
        self._certain: set[str] = set()
        """Questions whose label somebody has confirmed, or a worked solution proves."""

    def add(self, questions: dict[str, Question], samples: Iterable[Sample]) -> None:
        """Add the answers to some questions, except where there are only worked solutions that agree with the label."""
        by_question: dict[str, list[Sample]] = {}
        for sample in samples:
            by_question.setdefault(sample.question_id, []).append(sample)
        for question_id, answers in by_question.items():
            if all(sample.model == WORKED and sample.verdict == "accepted" for sample in answers):
                continue
            self._labels[question_id] = str(questions[question_id].answer)
            votes = self._votes[question_id] = {}
            for sample in answers:
                votes.setdefault(sample.model, []).append(sample.answer)
            right = [sample for sample in answers if sample.verdict == "accepted"]
            self._right[question_id] = {sample.answer for sample in right}
            if questions[question_id].reviewed or any(sample.model == WORKED for sample in right):
                self._certain.add(question_id)

    def suspects(self) -> list[Suspect]:
        """Labels that at least two models contradict with the same letter and that the evidence is against
        (mcq/labels.py), the most suspect first."""
        contested = weigh(self._votes, self._labels).suspects
        return [suspect for suspect in contested if suspect.score > 0 and self._is_suspect(suspect)]

    def _is_suspect(self, suspect: Suspect) -> bool:
        models_against = sum(suspect.suggested in letters for letters in self._votes[suspect.id].values())
        is_right = suspect.suggested in self._right[suspect.id]
        return models_against > 1 and not is_right and suspect.id not in self._certain


def _audit(suspects: Sequence[Suspect], samples: Iterable[Sample]) -> Iterator[str]:
    """A line of JSON for each suspect label, with the chains for and against it."""
    rows = {suspect.id: {**suspect._asdict(), "for": [], "against": []} for suspect in suspects}
    for sample in samples:
        if sample.question_id in rows:
            row = rows[sample.question_id]
            side = {row["label"]: "for", row["suggested"]: "against"}.get(sample.answer)
            if side is not None:
                row[side].append({"model": sample.model, "text": sample.text})
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
