"""questions: the user's files as one record per sub-question, split by problem, with an audit of the input.

Files may hold millions of problems, so they are streamed. Training problems are read once for their ids, from which the
validation split is drawn, once to be compared with the test, if there is one, and once to be repaired, audited and
written. Only an id and a digest of each are kept in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from stepladder import records
from stepladder.config import Config
from stepladder.context import Context
from stepladder.documents import Oddity, QuestionAudit
from stepladder.errors import InputError, UserError
from stepladder.mcq.overlap import TWIN_SIMILARITY, near_duplicates, problem_text
from stepladder.mcq.prompts import worked_parts
from stepladder.mcq.questionfile import Problem, Review, read_reviews, rows, stream_problems
from stepladder.mcq.shuffle import fixed, rng
from stepladder.records import Question, Split
from stepladder.workspace import Artifact, file_digest

MAX_FINDINGS_LISTED = 1000
"""Of one kind, in the audit; it counts all."""


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {"train": _digest(config.questions.train)}
    if config.questions.test is not None:
        inputs["test"] = _digest(config.questions.test)
    if config.questions.reviewed is not None:
        inputs["reviewed"] = _digest(config.questions.reviewed)
    settings = {"language": config.language, "seed": config.seed, "validation": config.questions.validation}
    return Artifact(context.input("questions"), settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    config = context.config
    held_out = _held_out(config)
    files = config.questions
    reviews = read_reviews(files.reviewed, files.train, config.language) if files.reviewed is not None else {}
    audit = Audit()
    audit.twins.add(_twins(config))  # first, so that its memory is free before the digests need some
    question_counts = _write(folder, _splits(config, held_out, reviews, audit))
    audit.document(question_counts, Counter(review.action for review in reviews.values())).write(folder)
    if counts := audit.counts():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        context.progress.say(f"odd in the input: {kinds}; see {context.input('questions') / QuestionAudit.FILE}")


def _held_out(config: Config) -> set[str]:
    """The first pass over the training problems: ids of those held out for validation."""
    train = config.questions.train
    ids = [row["id"] for _, row in rows(train)]
    if len(ids) < 2:
        raise InputError(train, "holds one problem; at least two are needed, one to train on and one for validation")
    return set(validation_ids(ids, config.questions.validation, config.seed))


def validation_ids(problems: list[str], share: float, seed: int) -> list[str]:
    """The problems held out for validation: at least one, and never all."""
    if len(problems) < 2:
        return []
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    return rng("validation", seed).sample(sorted(problems), count)


def _splits(
    config: Config, held_out: set[str], reviews: dict[str, Review], audit: Audit
) -> Iterator[tuple[Split, list[Question]]]:
    """The last pass: each problem's split and questions, with reviews applied."""
    for problem in audit.watch(config.questions.train, _train(config)):
        yield "validation" if problem.id in held_out else "train", _as_reviewed(problem.questions, reviews)
    if config.questions.test is not None:
        for problem in audit.watch(config.questions.test, _test(config)):
            yield "test", problem.questions


def _write(folder: Path, splits: Iterable[tuple[Split, list[Question]]]) -> dict[Split, int]:
    """Write all splits in one pass; returns the number of questions in each.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    counts: dict[Split, int] = dict.fromkeys(get_args(Split), 0)
    try:
        with ExitStack() as stack:
            files = {
                split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n"))
                for split in counts
            }
            for split, questions in splits:
                files[split].writelines(records.lines(questions))
                counts[split] += len(questions)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); free some space, or use another --runs"
        ) from None
    return counts


def _train(config: Config) -> Iterator[Problem]:
    return stream_problems(config.questions.train, config.language, labelled=True)


def _test(config: Config) -> Iterator[Problem]:
    """The problems of the test; none without one."""
    test = config.questions.test
    return iter(()) if test is None else stream_problems(test, config.language, labelled=False)


def _as_reviewed(questions: list[Question], reviews: dict[str, Review]) -> list[Question]:
    """A problem's questions with their reviewed labels, without those that a review drops."""
    kept = []
    for question in questions:
        review = reviews.get(question.id)
        if review is None:
            kept.append(question)
        elif review.action != "drop":
            answer = review.answer or question.answer
            kept.append(question.model_copy(update={"answer": answer, "reviewed": True}))
    return kept


class Findings:
    """Findings of an audit: the count of each kind, and the first of each to list."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[Oddity] = []

    def add(self, findings: Iterable[Oddity]) -> None:
        for finding in findings:
            self.counts[finding.kind] += 1
            if self.counts[finding.kind] <= MAX_FINDINGS_LISTED:
                self.first.append(finding)


class Audit:
    """Audits problems as they are streamed. Of each text only a digest is kept, to find repetitions."""

    def __init__(self) -> None:
        self.problems = 0
        self.odd, self.repeated, self.twins = Findings(), Findings(), Findings()
        self._first: dict[bytes, str] = {}

    def watch(self, path: Path, problems: Iterable[Problem]) -> Iterator[Problem]:
        """Pass a file's problems on, and audit each."""
        file, letters = path.name, Counter[str]()
        for problem in problems:
            self.problems += 1
            self.odd.add(_oddities(file, problem))
            self.repeated.add(self._repeats(file, problem))
            letters.update(question.answer for question in problem.questions if question.answer is not None)
            yield problem
        self.odd.add(_skew(file, letters))

    def _repeats(self, file: str, problem: Problem) -> Iterator[Oddity]:
        """A problem whose text came before, in this file or in the training file."""
        text = hashlib.blake2b(problem_text(problem.questions).encode(), digest_size=16).digest()
        if text in self._first:
            yield _oddity("repeated problem", file, problem.line, f"{problem.id} repeats {self._first[text]}")
        else:
            self._first[text] = problem.id

    def counts(self) -> dict[str, int]:
        """The number of findings of each kind, the most frequent first."""
        return dict((self.odd.counts + self.repeated.counts + self.twins.counts).most_common())

    def document(self, questions: Mapping[Split, int], reviewed: Mapping[str, int]) -> QuestionAudit:
        """The audit as a document, with the number of questions in each split and of reviews by decision."""
        counts = self.counts()
        unlisted = {kind: count - MAX_FINDINGS_LISTED for kind, count in counts.items() if count > MAX_FINDINGS_LISTED}
        return QuestionAudit(
            problems=self.problems,
            questions=questions,
            reviewed=reviewed,
            counts=counts,
            **({"not_listed": unlisted} if unlisted else {}),
            findings=(*self.odd.first, *self.repeated.first, *self.twins.first),
        )


def _oddity(kind: str, file: str, line: int, message: str) -> Oddity:
    return Oddity(kind=kind, file=file, line=line, message=message)


def _oddities(file: str, problem: Problem) -> Iterator[Oddity]:
    for subject, note in problem.notes:
        yield _oddity(note.kind, file, problem.line, f"{subject} {note.message}")
    for question in problem.questions:
        if (fixed_options := fixed(question)).places:
            all_fixed = len(fixed_options.places) == len(question.options)
            kept = "the order of its options" if all_fixed else "its place"
            yield _oddity("fixed options", file, problem.line, f"{question.id} keeps {kept}: {fixed_options.reason}")
        if (question.worked or "").strip() and worked_parts(question) is None:
            message = f"{question.id} has a worked solution that is not used: its last line must be one option's text"
            yield _oddity("unused worked solution", file, problem.line, message)


def _skew(file: str, letters: Counter[str]) -> Iterator[Oddity]:
    """A letter that is the label of more than half of a file's questions, where there are at least 30."""
    if letters and max(letters.values()) > 0.5 * letters.total() >= 15:
        letter, count = letters.most_common(1)[0]
        yield _oddity("letter skew", file, 0, f"{count} of {letters.total()} labels are {letter}")


def _twins(config: Config) -> Iterator[Oddity]:
    """Training problems that are in the test in nearly the same words; the trainset leaves them out."""
    training: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for pair in near_duplicates(_texts(_train(config), training), _texts(_test(config), test), TWIN_SIMILARITY):
        (name, line), (other, _) = training[pair.left], test[pair.right]
        message = f"{name} is nearly {other} of the test (similarity {pair.similarity:.2f})"
        yield _oddity("near-duplicate of a test problem", config.questions.train.name, line, message)


def _texts(problems: Iterable[Problem], places: list[tuple[str, int]]) -> Iterator[str]:
    """The whole text of each problem; its id and line are appended to ``places``."""
    for problem in problems:
        places.append((problem.id, problem.line))
        yield problem_text(problem.questions)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(path, "no such file; check [questions] in the configuration")
    return file_digest(path)
