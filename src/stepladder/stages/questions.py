"""questions: the user's files -> one record per sub-question, split by problem, with an audit of the input.

Files may hold millions of problems, so none is held: training problems pass by once for their ids, which the draw of
the validation split needs, once to be compared with the test, if there is one, and once to be repaired, audited and
written. What stays is an id and a digest each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from stepladder import records
from stepladder.config import Config
from stepladder.errors import InputError, UserError
from stepladder.mcq.overlap import TWIN, near_duplicates, whole
from stepladder.mcq.repair import Note, clean, note_defects, repair
from stepladder.mcq.shuffle import fixed, rng
from stepladder.records import LETTERS, Language, Question, Split
from stepladder.stages.flow import Context
from stepladder.workspace import Artifact, file_digest, write_atomic

LISTED = 1000
"""Findings of one kind that the audit lists; it counts them all."""


class Finding(NamedTuple):
    """Something odd in the input that stops nothing but that the user should know."""

    kind: str
    file: str
    line: int
    message: str


class Problem(NamedTuple):
    """The sub-questions of one line, in file order."""

    id: str
    line: int
    questions: list[Question]
    notes: list[tuple[str, Note]]
    """What was odd about it, and about which of its ids."""


def parts(config: Config) -> tuple[str | None, ...]:
    return (None,)


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
    held_out, reviews = _held_out(config), _reviews(config)
    audit = Audit()
    audit.twins.add(_twins(config))  # first: what it needs is gone before digests gather
    written = _write(folder, _splits(config, held_out, reviews, audit))
    summary = {
        "problems": audit.problems,
        "questions": written,
        "reviewed": dict(Counter(review.action for review in reviews.values())),
    }
    write_atomic(folder / "audit.json", json.dumps(summary | audit.found(), indent=1, ensure_ascii=False) + "\n")
    if counts := audit.counts():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        context.progress.say(f"odd in the input: {kinds}; see {context.input('questions') / 'audit.json'}")


def _held_out(config: Config) -> set[str]:
    """The first pass over the training problems: which of them are for validation."""
    train = config.questions.train
    ids = [row["id"] for _, row in _rows(train)]
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


def read_problems(path: Path, language: Language, *, labelled: bool) -> list[Problem]:
    """All of :func:`stream_problems`, for files known to be small."""
    return list(stream_problems(path, language, labelled=labelled))


def stream_problems(path: Path, language: Language, *, labelled: bool) -> Iterator[Problem]:
    """Read the contest's format: a line is ``{"id", "problem", "questions": [{"question", "options", "answer"}]}``;
    sub-questions may bring ``worked`` and ``program``. What can be put right is (mcq/repair.py), and noted.

    Raises:
        InputError: naming file, line and field.
    """
    return (_problem(path, number, row, language, labelled) for number, row in _rows(path))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines and their JSON objects, each with a text and an id that no line before it has; the rest is unread."""
    seen: dict[str, int] = {}
    for number, row in records.parse_lines(path):
        if not isinstance(row, dict):
            raise InputError(path, "is not a JSON object; one problem a line is expected", line=number)
        for field in ("id", "problem"):
            if not isinstance(row.get(field), str):
                reason = "must be a text" if field in row else "is missing; every problem needs one"
                raise InputError(path, reason, line=number, field=field)
        name = row["id"]
        if not name:
            raise InputError(path, "is empty; every problem needs one", line=number, field="id")
        if name in seen:
            reason = f"id {name!r} was used on line {seen[name]}; ids must be unique"
            raise InputError(path, reason, line=number, field="id")
        seen[name] = number
        yield number, row
    if not seen:
        raise InputError(path, "holds no problems; one JSON object a line is expected")


def _problem(path: Path, number: int, row: dict[str, Any], language: Language, labelled: bool) -> Problem:
    def wrong(field: str, problem: str) -> InputError:
        return InputError(path, problem, line=number, field=field)

    if not isinstance(row.get("questions"), list) or not row["questions"]:
        raise wrong("questions", "must be a list with at least one question")
    questions = []
    notes: list[Note] = []
    text = clean(row["problem"], notes)
    note_defects(text, notes)
    odd = [(row["id"], note) for note in notes]
    source = str(row.get("source", path.stem))
    for index, item in enumerate(row["questions"]):
        at = f"questions[{index}]"
        if not isinstance(item, dict):
            raise wrong(at, "must be an object with question, options and answer")
        if not isinstance(item.get("question"), str):
            raise wrong(f"{at}.question", "must be a text")
        options = item.get("options")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise wrong(f"{at}.options", "must be a list of texts")
        if not 1 <= len(options) <= len(LETTERS):
            raise wrong(f"{at}.options", f"has {len(options)} options; 2 to {len(LETTERS)} are needed")
        answer = item.get("answer")
        if answer is not None and (not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS):
            allowed = LETTERS[: max(2, len(options))]
            raise wrong(f"{at}.answer", f"{answer!r} is not one of the letters {allowed[0]} to {allowed[-1]}")
        repaired = repair(item["question"], tuple(options), answer)
        odd += [(f"{row['id']}#{index}", note) for note in repaired.notes]
        count = len(repaired.options)
        if not 2 <= count <= len(LETTERS):
            raise wrong(f"{at}.options", f"has {count} options; 2 to {len(LETTERS)} are needed")
        if repaired.answer is not None and repaired.answer not in LETTERS[:count]:
            raise wrong(f"{at}.answer", f"{answer!r} is not one of the letters A to {LETTERS[count - 1]}")
        if answer is None and labelled:
            raise wrong(f"{at}.answer", "is missing; training questions need their letter")
        for field in ("worked", "program"):
            if item.get(field) is not None and not isinstance(item[field], str):
                raise wrong(f"{at}.{field}", "must be a text or null")
        questions.append(
            Question(
                id=f"{row['id']}#{index}",
                problem_id=row["id"],
                problem=text,
                question=repaired.question,
                options=repaired.options,
                answer=repaired.answer,
                language=language,
                source=source,
                worked=item.get("worked"),
                program=item.get("program"),
            )
        )
    return Problem(row["id"], number, questions, odd)


class Review(NamedTuple):
    """What somebody decided about a label."""

    action: Literal["keep", "relabel", "drop"]
    answer: str | None = None


def _reviews(config: Config) -> dict[str, Review]:
    """Decisions by question id; none where nobody has looked."""
    path, train = config.questions.reviewed, config.questions.train
    if path is None:
        return {}
    about = {name.rpartition("#")[0] for name in _named(path)}
    lines = ((number, row) for number, row in _rows(train) if row["id"] in about)
    problems = (_problem(train, number, row, config.language, True) for number, row in lines)
    return read_reviews(path, {q.id: q for problem in problems for q in problem.questions})


def _named(path: Path) -> Iterator[str]:
    """Ids that reviews are about, whatever else is wrong with them."""
    for _, row in records.parse_lines(path):
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            yield row["id"]


def read_reviews(path: Path, known: Mapping[str, Question]) -> dict[str, Review]:
    """Decisions by question id, about questions of the training file.

    Raises:
        InputError: naming file, line and field.
    """
    reviews: dict[str, Review] = {}
    for number, row in records.parse_lines(path):
        asked = row.get("id") if isinstance(row, dict) else row
        if not isinstance(row, dict) or not isinstance(asked, str) or asked not in known:
            raise InputError(path, f"{asked!r} is no training question", line=number, field="id")
        question, action, answer = known[asked], row.get("action"), row.get("answer")
        if action not in ("keep", "relabel", "drop"):
            raise InputError(path, f"{action!r} is none of keep, relabel, drop", line=number, field="action")
        letters = LETTERS[: len(question.options)]
        if action == "relabel" and (not isinstance(answer, str) or len(answer) != 1 or answer not in letters):
            reason = f"{answer!r} is not one of the letters A to {letters[-1]}"
            raise InputError(path, reason, line=number, field="answer")
        reviews[question.id] = Review(action, answer if action == "relabel" else None)
    return reviews


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
        self.first: list[Finding] = []

    def add(self, findings: Iterable[Finding]) -> None:
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

    def _repeats(self, file: str, problem: Problem) -> Iterator[Finding]:
        """Twins inside a file, and leaks from test into training."""
        text = hashlib.blake2b(whole(problem.questions).encode(), digest_size=16).digest()
        if text in self._first:
            yield Finding("repeated problem", file, problem.line, f"{problem.id} repeats {self._first[text]}")
        else:
            self._first[text] = problem.id

    def counts(self) -> dict[str, int]:
        """How many findings of each kind, the most frequent first."""
        return dict((self.odd.counts + self.repeated.counts + self.twins.counts).most_common())

    def found(self) -> dict[str, Any]:
        """All of it for the audit's file."""
        counts = self.counts()
        unlisted = {kind: count - LISTED for kind, count in counts.items() if count > LISTED}
        findings = (*self.odd.first, *self.repeated.first, *self.twins.first)
        return (
            {"counts": counts}
            | ({"not_listed": unlisted} if unlisted else {})
            | {"findings": [finding._asdict() for finding in findings]}
        )


def _oddities(file: str, problem: Problem) -> Iterator[Finding]:
    for about, note in problem.notes:
        yield Finding(note.kind, file, problem.line, f"{about} {note.message}")
    for question in problem.questions:
        if (stays := fixed(question)).places:
            shown = "the order of its options" if len(stays.places) == len(question.options) else "its place"
            yield Finding("fixed options", file, problem.line, f"{question.id} keeps {shown}: {stays.reason}")


def _skew(file: str, letters: Counter[str]) -> Iterator[Finding]:
    """A letter that is the label of more than half of the questions, where they are enough to tell."""
    if letters and max(letters.values()) > 0.5 * letters.total() >= 15:
        letter, count = letters.most_common(1)[0]
        yield Finding("letter skew", file, 0, f"{count} of {letters.total()} labels are {letter}")


def _twins(config: Config) -> Iterator[Finding]:
    """Training problems that stand in the test in other words; the trainset leaves them out."""
    mine: list[tuple[str, int]] = []
    theirs: list[tuple[str, int]] = []
    for pair in near_duplicates(_texts(_train(config), mine), _texts(_test(config), theirs), TWIN):
        (name, line), (other, _) = mine[pair.left], theirs[pair.right]
        message = f"{name} is nearly {other} of the test (similarity {pair.similarity:.2f})"
        yield Finding("near-duplicate of a test problem", config.questions.train.name, line, message)


def _texts(problems: Iterable[Problem], passed: list[tuple[str, int]]) -> Iterator[str]:
    """The whole text of each problem; its id and line are added to ``passed``."""
    for problem in problems:
        passed.append((problem.id, problem.line))
        yield whole(problem.questions)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(path, "no such file; check [questions] in the configuration")
    return file_digest(path)
