"""What is odd about the problems of a file that is read in pieces: each piece is audited alone, and the findings are
put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from stepladder.documents import Oddity, PieceAudit, QuestionAudit
from stepladder.mcq.prompts import worked_parts
from stepladder.mcq.questionfile import Problem
from stepladder.mcq.shuffle import fixed
from stepladder.records import Split

MAX_FINDINGS_LISTED = 1000
"""Of one kind, in the audit; it counts all."""


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

    def add_piece(self, piece: PieceAudit) -> None:
        """Add those of the next piece of a file, of which it lists the first and counts all."""
        self.add(piece.findings)
        self.counts.update(Counter(piece.counts) - Counter(finding.kind for finding in piece.findings))


class PieceAuditor:
    """Audits the problems of a piece as they are streamed."""

    def __init__(self) -> None:
        self._problems, self._odd, self._letters = 0, Findings(), Counter[str]()

    def watch(self, file: str, problems: Iterable[Problem]) -> Iterator[Problem]:
        """Pass a file's problems on, and audit each."""
        for problem in problems:
            self._problems += 1
            self._odd.add(_oddities(file, problem))
            self._letters.update(question.answer for question in problem.questions if question.answer is not None)
            yield problem

    def document(self, questions: Mapping[Split, int]) -> PieceAudit:
        """The audit, with the number of questions in each split."""
        return PieceAudit(
            problems=self._problems, questions=questions, letters=self._letters, counts=self._odd.counts,
            findings=tuple(self._odd.first),
        )  # fmt: skip


class Text(NamedTuple):
    """The text of a problem."""

    id: str
    """Of the problem."""
    line: int
    digest: str
    """Hexadecimal."""


class Audit:
    """The audit of all files. Of each problem's text only a digest is kept, to find repetitions."""

    def __init__(self) -> None:
        self._problems = 0
        self._questions: Counter[Split] = Counter({"train": 0, "validation": 0, "test": 0})
        self._odd, self._repeated, self.others = Findings(), Findings(), Findings()
        self._first: dict[bytes, str] = {}

    def add_file(self, file: str, pieces: Iterable[tuple[PieceAudit, Iterable[Text]]]) -> None:
        """Add the pieces of a file, each with the texts of its problems. A letter may be the label of more than half of
        the file's questions, where there are at least 30."""
        letters = Counter[str]()
        for piece, texts in pieces:
            self._problems += piece.problems
            self._questions.update(piece.questions)
            letters.update(piece.letters)
            self._odd.add_piece(piece)
            self._repeated.add(self._repeats(file, texts))
        if letters and max(letters.values()) > 0.5 * letters.total() >= 15:
            letter, count = letters.most_common(1)[0]
            self._odd.add([_oddity("letter skew", file, 0, f"{count} of {letters.total()} labels are {letter}")])

    def _repeats(self, file: str, texts: Iterable[Text]) -> Iterator[Oddity]:
        """Problems whose text came before, in this file or in the training file."""
        for name, line, digest in texts:
            text = bytes.fromhex(digest)
            if text in self._first:
                yield _oddity("repeated problem", file, line, f"{name} repeats {self._first[text]}")
            else:
                self._first[text] = name

    def counts(self) -> dict[str, int]:
        """The number of findings of each kind, the most frequent first."""
        return dict((self._odd.counts + self._repeated.counts + self.others.counts).most_common())

    def document(self, reviewed: Mapping[str, int]) -> QuestionAudit:
        """The audit as a document, with the number of reviews by decision."""
        counts = self.counts()
        unlisted = {kind: count - MAX_FINDINGS_LISTED for kind, count in counts.items() if count > MAX_FINDINGS_LISTED}
        return QuestionAudit(
            problems=self._problems,
            questions=dict(self._questions),
            reviewed=reviewed,
            counts=counts,
            **({"not_listed": unlisted} if unlisted else {}),
            findings=(*self._odd.first, *self._repeated.first, *self.others.first),
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
