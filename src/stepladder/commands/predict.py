"""``stepladder predict``: a finished model and a file of questions in, the contest's answer file out, without a run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from rich.console import Console

from stepladder import models
from stepladder.answering import team as teams
from stepladder.answering.client import FolderClient
from stepladder.answering.standalone import Answers, AnswerSettings, answer, read_settings, so_far
from stepladder.answering.team import Team
from stepladder.ask.local.engine import BATCH_SIZE
from stepladder.config import Serve
from stepladder.errors import GateError, ModelError, ServeError, UserError
from stepladder.forecast import memory, model_shape
from stepladder.mcq.answerfile import problems_in, submission
from stepladder.mcq.questionfile import read_problems
from stepladder.packaging import selftest
from stepladder.progress import Lane, Progress
from stepladder.records import Language, Prediction, Question
from stepladder.serving.cards import side_by_side_settings, visible_cards
from stepladder.terminal import say
from stepladder.workspace import write_atomic

RUN = "predict"
"""What its answers are counted for in the ledger."""
NAMED = 10
"""Ids that a line names; the rest are counted."""
KEPT = 20_000
"""Bytes that the ledger may take for one answer."""
SPARE = 64 * 2**20
"""Bytes of disk beside the ledger: logs, and the answer file."""


def predict(
    model: str,
    source: Path,
    out: Path,
    console: Console,
    *,
    language: Language | None = None,
    predict_settings: dict[str, Any] | None = None,
    serve_settings: dict[str, Any] | None = None,
    minutes: float | None = None,
    least: float | None = None,
    expected: Path | None = None,
) -> None:
    """Answer every question of a file and write one line a problem: its id, and a letter for each of its questions.

    Answers are kept beside ``out``, in ``<out>.ledger.sqlite``, so that a killed command goes on where it was.

    Args:
        model: the folder of a model or of a package, or an id on a hub.
        source: JSONL in the contest's form. Where it has letters already, how many were met is said.
        out: what is written, at once, when all is answered.
        console: where progress is shown.
        language: of the prompts, where the folder does not tell it.
        predict_settings: keys of ``[predict]`` that take precedence over what the model was validated with.
        serve_settings: keys of ``[serve]`` that do.
        minutes: how long it may take. A whole file of first letters is written before anything else, unless an earlier
            command left one for these questions, and replaced at the end; when the time is up, by what was answered
            until then.
        least: share of a labelled file's letters that must be met.
        expected: of a package's self-test, what its answers are held against (``packaging.selftest``).

    Raises:
        InputError: a file is wrong, naming line and field.
        ModelError, TemplateError, ServeError: the model cannot be asked.
        UserError: the disk is too full, or memory too small.
        GateError: fewer letters than ``least`` are those of a labelled file, or not those that are expected. The
            answer file is there.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name a file in another one")
    if minutes is not None:
        questions = _read(source, language or "en")
        letters = submission(questions, [_unanswered(question) for question in questions])
        if not out.is_file() or problems_in(out.read_bytes()) != problems_in(letters.encode()):
            write_atomic(out, letters)
    team = teams.find(model)
    how = read_settings(team.members[team.leader], language)
    how = how._replace(
        predict=how.predict.model_copy(update=predict_settings or {}),
        serve=Serve.model_validate(how.serve.model_dump() | (serve_settings or {})),
        prompts=team.prompts or how.prompts,
    )
    questions = _read(source, how.language)
    _check_disk(out, len(questions) * how.predict.votes * len(team.members))
    if how.predict.engine == "local" and not visible_cards():
        _check_memory(team.members[team.leader], questions, how)
    progress = Progress(console)
    computed_in = models.dtype_name(how.predict.dtype) if how.predict.engine == "local" else None
    if None not in (how.validated_in, computed_in) and how.validated_in != computed_in:
        before = f"it was validated in {how.validated_in}, so a near tie may fall the other way"
        say(console, f"Computed in {computed_in}; {before}")
    beside = out.with_name(f"{out.name}.ledger.sqlite")
    work = Assignment(beside, out.with_name(f"{out.name}.serve"), progress, team, questions, how)
    try:
        with progress.stage(out.name):
            done = work.answer(minutes)
    except TimeIsUpError:
        known = team.join({name: work.so_far(name) for name in team.members})
        write_atomic(out, submission(questions, known))
        count = f"{sum(answer.answer is not None for answer in known):,} of {len(questions):,} questions"
        say(console, f"Time is up. Wrote {out}: {count} answered, the first letter for the others")
        return
    joined = team.join({name: answers.predictions for name, answers in done.items()})
    write_atomic(out, submission(questions, joined))
    met = [q.answer == p.answer for q, p in zip(questions, joined, strict=True) if q.answer is not None]
    labelled = f", {sum(met):,} of {len(met):,} as labelled ({sum(met) / len(met):.1%})" if met else ""
    say(console, f"Wrote {out}: {len(questions):,} questions{labelled}")
    for name, answers in done.items():
        whose = f"{name}: " if len(done) > 1 else ""
        _count(console, answers.mended, f"{whose}answered when asked again")
        why = "since nothing that was said could be read"
        _count(console, answers.likeliest, f"{whose}answered by the likeliest option, {why}")
    if expected is not None:
        here = models.machine(how.predict.dtype) if how.predict.engine == "local" else None
        say(console, f"Self-test: {selftest.check(expected, here, joined, questions)}")
    if least is not None and sum(met) < least * len(met):
        raise GateError(f"{source}: {sum(met):,} of {len(met):,} answers are as labelled, less than {least:.0%}")


class Assignment(NamedTuple):
    """The questions, and who answers them."""

    ledger: Path
    scratch: Path
    progress: Progress
    team: Team
    questions: Sequence[Question]
    how: AnswerSettings

    def answer(self, minutes: float | None) -> dict[str, Answers]:
        """Every member's answers. Servers stand side by side where they fit; otherwise one member follows another.

        Raises:
            TimeIsUpError: after so many minutes; what was answered is kept.
        """
        members, serve = self.team.members, self.how.serve
        stop = threading.Event()
        with _limit(minutes, stop):
            if len(members) > 1 and self.how.predict.engine == "vllm" and not serve.base_url:
                shared = side_by_side_settings([*members.values()], serve)
                if shared is not None:
                    try:
                        return self._side_by_side(shared)
                    except ServeError as error:
                        self.progress.say(f"side by side they could not be served ({error}); one after another now")
            with self._client(self.scratch, serve, self.progress, stop) as client:
                return {name: self._ask(client, name) for name in members}

    def _client(self, scratch: Path, serve: Serve, progress: Progress | Lane, stop: threading.Event) -> FolderClient:
        return FolderClient(self.ledger, RUN, scratch, serve, self.how.predict.dtype, progress, stop)

    def _side_by_side(self, serve: Serve) -> dict[str, Answers]:
        stop = threading.Event()
        lanes: dict[tuple[str, str], tuple[float, float]] = {}

        def asked(name: str) -> Answers:
            lane = Lane(self.progress, name, lanes)
            with self._client(self.scratch / name, serve, lane, stop) as client:
                return self._ask(client, name)

        with ThreadPoolExecutor(len(self.team.members)) as pool:
            asking = {name: pool.submit(asked, name) for name in self.team.members}
            try:
                for future in as_completed(asking.values()):
                    future.result()
            except BaseException:  # one has failed, the time is up, or somebody interrupts: the others end too
                stop.set()
                raise
        return {name: future.result() for name, future in asking.items()}

    def _ask(self, client: FolderClient, name: str) -> Answers:
        label = "answers" if len(self.team.members) == 1 else name
        return answer(client, self.team.members[name], self.questions, self.how, label)

    def so_far(self, name: str) -> list[Prediction]:
        """What is known of a member's answers while they are still being given."""
        return so_far(self.ledger, self.team.members[name], self.questions, self.how)


class TimeIsUpError(BaseException):
    """The limit is reached. Like an interrupt, nothing that catches errors may catch it."""


@contextlib.contextmanager
def _limit(minutes: float | None, stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` and raise TimeIsUpError in this block once the time is up: a server that is still writing, or hangs,
    is not waited for."""

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        stop.set()
        raise TimeIsUpError

    if minutes is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _read(source: Path, language: Language) -> list[Question]:
    return [question for problem in read_problems(source, language, labelled=False) for question in problem.questions]


def _check_disk(out: Path, answers: int) -> None:
    """Raises UserError where what is kept beside the answer file would not fit."""
    needed, free = answers * KEPT + SPARE, shutil.disk_usage(out.parent).free
    if free < needed:
        sizes = f"{needed / 2**20:,.0f} MiB for {answers:,} answers, and {free / 2**20:,.0f} are free"
        raise UserError(f"{out.parent}: its disk needs {sizes}; free some, or name a file in another folder")


def _check_memory(weights: Path, questions: Sequence[Question], how: AnswerSettings) -> None:
    """Raises UserError where the host's memory is surely too small: a process that is killed says nothing."""
    try:
        shape = model_shape.read(weights)
    except ModelError:  # of a kind that nothing is known of
        return
    needed = memory.answering(shape, min(len(questions), BATCH_SIZE), how.predict.max_tokens).total
    if (free := memory.free()) is not None and needed > free:
        sizes = f"{needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
        raise UserError(f"{weights}: answering takes {sizes}; end something, or take a larger machine")


def _unanswered(question: Question) -> Prediction:
    return Prediction(question_id=question.id, member="model", votes=(), answer=None, texts=())


def _count(console: Console, ids: list[str], what: str) -> None:
    if ids:
        more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
        named = ", ".join(ids[:NAMED])
        say(console, f"{len(ids):,} {what}: {named}{more}")
