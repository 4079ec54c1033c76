"""questions: the user's files -> one record per sub-question, split by problem, with an audit of the input."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stepladder import records
from stepladder.config import Config
from stepladder.errors import InputError
from stepladder.mcq.overlap import TWIN, near_duplicates, whole
from stepladder.mcq.repair import Note, clean, repair
from stepladder.mcq.shuffle import fixed, rng
from stepladder.records import LETTERS, Language, Question
from stepladder.stages.flow import Context
from stepladder.workspace import Artifact, file_digest, write_atomic


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
    train = read_problems(config.questions.train, config.language, labelled=True)
    if len(train) < 2:
        reason = "holds one problem; at least two are needed, one to train on and one for validation"
        raise InputError(config.questions.train, reason)
    test = []
    if config.questions.test is not None:
        test = read_problems(config.questions.test, config.language, labelled=False)
    findings = [*_audit(config.questions.train, train), *(_audit(config.questions.test, test) if test else ())]
    findings += _shared_texts(config, train, test)
    findings += _twins(config, train, test)
    held_out = set(validation_ids([problem.id for problem in train], config.questions.validation, config.seed))
    reviewed: Counter[str] = Counter()
    if config.questions.reviewed is not None:
        train, reviewed = apply_reviews(train, read_reviews(config.questions.reviewed, train))
    splits = {
        "train": [q for problem in train if problem.id not in held_out for q in problem.questions],
        "validation": [q for problem in train if problem.id in held_out for q in problem.questions],
        "test": [q for problem in test for q in problem.questions],
    }
    for name, questions in splits.items():
        write_atomic(folder / f"{name}.jsonl", records.lines(questions))
    audit = {
        "problems": len(train) + len(test),
        "questions": {name: len(questions) for name, questions in splits.items()},
        "reviewed": dict(reviewed),
        "counts": dict(Counter(finding.kind for finding in findings).most_common()),
        "findings": [finding._asdict() for finding in findings],
    }
    write_atomic(folder / "audit.json", json.dumps(audit, indent=1, ensure_ascii=False) + "\n")
    if findings:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(f.kind for f in findings).most_common())
        context.progress.say(f"odd in the input: {kinds}; see {context.input('questions') / 'audit.json'}")


def validation_ids(problems: list[str], share: float, seed: int) -> list[str]:
    """The problems held out for validation: at least one, and never all."""
    if len(problems) < 2:
        return []
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    return rng("validation", seed).sample(sorted(problems), count)


def read_problems(path: Path, language: Language, *, labelled: bool) -> list[Problem]:
    """Read the contest's format: a line is ``{"id", "problem", "questions": [{"question", "options", "answer"}]}``;
    sub-questions may bring ``worked`` and ``program``. What can be put right is (mcq/repair.py), and noted.

    Raises:
        InputError: naming file, line and field.
    """
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, row in records.parse_lines(path):
        problem = _problem(path, number, row, language, labelled)
        if problem.id in seen:
            reason = f"id {problem.id!r} was used on line {seen[problem.id]}; ids must be unique"
            raise InputError(path, reason, line=number, field="id")
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise InputError(path, "holds no problems; one JSON object a line is expected")
    return problems


def _problem(path: Path, number: int, row: Any, language: Language, labelled: bool) -> Problem:
    def wrong(field: str, problem: str) -> InputError:
        return InputError(path, problem, line=number, field=field)

    if not isinstance(row, dict):
        raise InputError(path, "is not a JSON object; one problem a line is expected", line=number)
    for field in ("id", "problem"):
        if not isinstance(row.get(field), str):
            raise wrong(field, "must be a text" if field in row else "is missing; every problem needs one")
    if not row["id"]:
        raise wrong("id", "is empty; every problem needs one")
    if not isinstance(row.get("questions"), list) or not row["questions"]:
        raise wrong("questions", "must be a list with at least one question")
    questions = []
    notes: list[Note] = []
    text = clean(row["problem"], notes)
    if "\ufffd" in text:
        notes.append(Note("broken text", "holds U+FFFD (a lost character)"))
    odd = [(row["id"], note) for note in notes]
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
                source=str(row.get("source", path.stem)),
                worked=item.get("worked"),
                program=item.get("program"),
            )
        )
    return Problem(row["id"], number, questions, odd)


class Review(NamedTuple):
    """What somebody decided about a label."""

    action: Literal["keep", "relabel", "drop"]
    answer: str | None = None


def read_reviews(path: Path, train: list[Problem]) -> dict[str, Review]:
    """Decisions by question id.

    Raises:
        InputError: naming file, line and field.
    """
    known = {question.id: question for problem in train for question in problem.questions}
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


def apply_reviews(train: list[Problem], reviews: dict[str, Review]) -> tuple[list[Problem], Counter[str]]:
    """The problems as reviewed, and how often each decision was taken."""
    counts = Counter(review.action for review in reviews.values())
    changed = []
    for problem in train:
        kept = []
        for question in problem.questions:
            review = reviews.get(question.id)
            if review is None:
                kept.append(question)
            elif review.action != "drop":
                answer = review.answer or question.answer
                kept.append(question.model_copy(update={"answer": answer, "reviewed": True}))
        changed.append(problem._replace(questions=kept))
    return changed, Counter({str(action): count for action, count in counts.items()})


def _audit(path: Path | None, problems: list[Problem]) -> Iterator[Finding]:
    name = "" if path is None else path.name
    for problem in problems:
        for about, note in problem.notes:
            yield Finding(note.kind, name, problem.line, f"{about} {note.message}")
        for question in problem.questions:
            if (stays := fixed(question)).places:
                shown = "the order of its options" if len(stays.places) == len(question.options) else "its place"
                yield Finding("fixed options", name, problem.line, f"{question.id} keeps {shown}: {stays.reason}")
    letters = Counter(q.answer for problem in problems for q in problem.questions if q.answer is not None)
    if letters and max(letters.values()) > 0.5 * sum(letters.values()) >= 15:
        letter, count = letters.most_common(1)[0]
        yield Finding("letter skew", name, 0, f"{count} of {sum(letters.values())} labels are {letter}")


def _shared_texts(config: Config, train: list[Problem], test: list[Problem]) -> Iterator[Finding]:
    """Problems whose text stands more than once: twins inside a file, and leaks from test into training."""
    first: dict[str, str] = {}
    files = [(config.questions.train, train)]
    if config.questions.test is not None:
        files.append((config.questions.test, test))
    for path, problems in files:
        for problem in problems:
            text = whole(problem.questions)
            if text in first:
                yield Finding("repeated problem", path.name, problem.line, f"{problem.id} repeats {first[text]}")
            first.setdefault(text, problem.id)


def _twins(config: Config, train: list[Problem], test: list[Problem]) -> Iterator[Finding]:
    """Training problems that stand in the test in other words; the trainset leaves them out."""
    for pair in near_duplicates([whole(p.questions) for p in train], [whole(p.questions) for p in test], TWIN):
        mine, theirs = train[pair.left], test[pair.right]
        message = f"{mine.id} is nearly {theirs.id} of the test (similarity {pair.similarity:.2f})"
        yield Finding("near-duplicate of a test problem", config.questions.train.name, mine.line, message)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(path, "no such file; check [questions] in the configuration")
    return file_digest(path)
