"""questions: the user's files -> one record per sub-question, split by problem, with an audit of the input.

Files may hold millions of problems, so none is held: training problems pass by once for their ids, which the draw of
the validation split needs, once to be compared with the test, if there is one, and once to be repaired, audited and
written. What stays is an id and a digest each.
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

LISTED = 1000
"""Findings of one kind that the audit lists; it counts them all."""


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {"train": _digest(config.questions.train)}
    if config.questions.test is not None:
        inputs["test"] = _digest(config.questions.test)
    if config.questions.reviewed is not None:
        inputs["reviewed"] = _digest(config.questions.reviewed)
    settings = {"language": config.language, "seed": config.seed, "validation": config.questions.validation}
    return Artifact(context.workspace.path("questions"), settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    config = context.config
    held_out = _held_out(config)
    files = config.questions
    reviews = read_reviews(files.reviewed, files.train, config.language) if files.reviewed is not None else {}
    audit = Audit()
    audit.twins.add(_twins(config))  # first: what it needs is gone before digests gather
    written = _write(folder, _splits(config, held_out, reviews, audit))
    audit.document(written, Counter(review.action for review in reviews.values())).write(folder)
    if counts := audit.counts():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        context.progress.say(f"odd in the input: {kinds}; see {context.input('questions') / QuestionAudit.FILE}")


def _held_out(config: Config) -> set[str]:
    """The first pass over the training problems: which of them are for validation."""
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
    """The last pass: the questions of each problem as reviewed, and where they go."""
    for problem in audit.watch(config.questions.train, _train(config)):
        yield "validation" if problem.id in held_out else "train", _as_reviewed(problem.questions, reviews)
    if config.questions.test is not None:
        for problem in audit.watch(config.questions.test, _test(config)):
            yield "test", problem.questions


def _write(folder: Path, splits: Iterable[tuple[Split, list[Question]]]) -> dict[Split, int]:
    """Write all splits in one pass, as they come; how many questions each has.

    Raises:
        UserError: the disk is full.
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
        raise UserError(f"{folder}: cannot be written ({error.strerror}); make room, or use another --runs") from None
    return counts


def _train(config: Config) -> Iterator[Problem]:
    return stream_problems(config.questions.train, config.language, labelled=True)


def _test(config: Config) -> Iterator[Problem]:
    """Nothing where there is no test."""
    test = config.questions.test
    return iter(()) if test is None else stream_problems(test, config.language, labelled=False)


def _as_reviewed(questions: list[Question], reviews: dict[str, Review]) -> list[Question]:
    """What is left of a problem's questions, with the labels as decided."""
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
    """All that was found of some kinds, counted, and the first of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[Oddity] = []

    def add(self, findings: Iterable[Oddity]) -> None:
        for finding in findings:
            self.counts[finding.kind] += 1
            if self.counts[finding.kind] <= LISTED:
                self.first.append(finding)


class Audit:
    """What is odd about the problems that pass by. Of a text that may come again only a digest is kept."""

    def __init__(self) -> None:
        self.problems = 0
        self.odd, self.repeated, self.twins = Findings(), Findings(), Findings()
        self._first: dict[bytes, str] = {}

    def watch(self, path: Path, problems: Iterable[Problem]) -> Iterator[Problem]:
        """The problems of a file, looked at on their way."""
        file, letters = path.name, Counter[str]()
        for problem in problems:
            self.problems += 1
            self.odd.add(_oddities(file, problem))
            self.repeated.add(self._repeats(file, problem))
            letters.update(question.answer for question in problem.questions if question.answer is not None)
            yield problem
        self.odd.add(_skew(file, letters))

    def _repeats(self, file: str, problem: Problem) -> Iterator[Oddity]:
        """Twins inside a file, and leaks from test into training."""
        text = hashlib.blake2b(problem_text(problem.questions).encode(), digest_size=16).digest()
        if text in self._first:
            yield _oddity("repeated problem", file, problem.line, f"{problem.id} repeats {self._first[text]}")
        else:
            self._first[text] = problem.id

    def counts(self) -> dict[str, int]:
        """How many findings of each kind, the most frequent first."""
        return dict((self.odd.counts + self.repeated.counts + self.twins.counts).most_common())

    def document(self, questions: Mapping[Split, int], reviewed: Mapping[str, int]) -> QuestionAudit:
        """All of it, with the number of questions in each split and of reviews by what was decided."""
        counts = self.counts()
        unlisted = {kind: count - LISTED for kind, count in counts.items() if count > LISTED}
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
    for about, note in problem.notes:
        yield _oddity(note.kind, file, problem.line, f"{about} {note.message}")
    for question in problem.questions:
        if (stays := fixed(question)).places:
            shown = "the order of its options" if len(stays.places) == len(question.options) else "its place"
            yield _oddity("fixed options", file, problem.line, f"{question.id} keeps {shown}: {stays.reason}")
        if (question.worked or "").strip() and worked_parts(question) is None:
            message = f"{question.id} has a worked solution that is not used: its last line must be one option's text"
            yield _oddity("unused worked solution", file, problem.line, message)


def _skew(file: str, letters: Counter[str]) -> Iterator[Oddity]:
    """A letter that is the label of more than half of the questions, where they are enough to tell."""
    if letters and max(letters.values()) > 0.5 * letters.total() >= 15:
        letter, count = letters.most_common(1)[0]
        yield _oddity("letter skew", file, 0, f"{count} of {letters.total()} labels are {letter}")


def _twins(config: Config) -> Iterator[Oddity]:
    """Training problems that stand in the test in other words; the trainset leaves them out."""
    mine: list[tuple[str, int]] = []
    theirs: list[tuple[str, int]] = []
    for pair in near_duplicates(_texts(_train(config), mine), _texts(_test(config), theirs), TWIN_SIMILARITY):
        (name, line), (other, _) = mine[pair.left], theirs[pair.right]
        message = f"{name} is nearly {other} of the test (similarity {pair.similarity:.2f})"
        yield _oddity("near-duplicate of a test problem", config.questions.train.name, line, message)


def _texts(problems: Iterable[Problem], passed: list[tuple[str, int]]) -> Iterator[str]:
    """The text of each problem with its questions; its id and line are added to ``passed``."""
    for problem in problems:
        passed.append((problem.id, problem.line))
        yield problem_text(problem.questions)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(path, "no such file; check [questions] in the configuration")
    return file_digest(path)
