"""``stepladder predict``: answer a file of questions with a finished model, without a run."""

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
from stepladder.answering.client import FolderClient, check_ledger
from stepladder.answering.standalone import AnswerSettings, answer, read_settings, so_far
from stepladder.answering.team import Team
from stepladder.config import Cluster, Serve
from stepladder.errors import GateError, ModelError, ServeError, UserError
from stepladder.forecast import memory, model_shape
from stepladder.mcq.answerfile import problems_in, submission
from stepladder.mcq.questionfile import read_problems
from stepladder.models.free_memory import free_on_host
from stepladder.packaging import selftest
from stepladder.progress import Lane, Progress
from stepladder.records import Language, Prediction, Question
from stepladder.serving.cards import side_by_side_settings, visible_cards
from stepladder.terminal import say
from stepladder.workspace import write_atomic

LEDGER_RUN = "predict"
"""The name of the run that answers are counted for in the ledger."""
MAX_IDS_NAMED = 10
"""On one line of output; the rest are counted."""
LEDGER_BYTES_PER_ANSWER = 20_000
"""An upper bound."""
SPARE_BYTES = 64 * 2**20
"""Disk space beside the ledger, for logs and the answer file."""


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
    cluster: Cluster | None = None,
) -> None:
    """Answer every question of a file and write one line a problem: its id, and a letter for each of its questions.

    Answers are kept beside ``out``, in ``<out>.ledger.sqlite``, so that a killed command continues where it stopped.

    Args:
        model: the folder of a model or of a package, or an id on a hub.
        source: JSONL in the contest's form. Where it has labels, the number of right answers is printed.
        out: answer file, written when all questions are answered.
        console: where progress is shown.
        language: of the prompts; by default the folder's.
        predict_settings: keys of ``[predict]`` that take precedence over those the model was validated with.
        serve_settings: the same for ``[serve]``.
        minutes: time limit. A complete file of first letters is written before anything else, unless an earlier
            command left one for these questions. It is replaced at the end, or, when the time is up, by the answers
            given until then.
        least: share of a labelled file's questions that must be answered rightly.
        expected: a package's expected self-test answers, with which its answers are compared
            (``packaging.selftest``).
        cluster: whose nodes vLLM servers run on, by default this machine.

    Raises:
        InputError: a file is wrong, naming line and field.
        ModelError, TemplateError, ServeError: the model cannot be asked.
        UserError: too little disk space or memory.
        GateError: less than ``least`` of the answers are right, or they are not those that are expected. The answer
            file has been written.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name a file in another one")
    if minutes is not None:
        questions = _read(source, language or "en")
        first_letters = submission(questions, [_unanswered(question) for question in questions])
        if not out.is_file() or problems_in(out.read_bytes()) != problems_in(first_letters.encode()):
            write_atomic(out, first_letters)
    team = teams.find(model)
    settings = read_settings(team.members[team.leader], language)
    settings = settings._replace(
        predict=settings.predict.model_copy(update=predict_settings or {}),
        serve=Serve.model_validate(settings.serve.model_dump() | (serve_settings or {})),
        prompts=team.prompts or settings.prompts,
    )
    is_local, dtype = settings.predict.engine == "local", settings.predict.dtype
    if cluster is not None and (is_local or settings.serve.base_url):
        raise UserError("--cluster starts vLLM servers on its nodes; add --engine vllm, and leave --url out")
    questions = _read(source, settings.language)
    _check_disk(out, len(questions) * settings.predict.votes * len(team.members))
    if is_local and not visible_cards():
        _check_memory(team.members[team.leader], settings)
    progress = Progress(console)
    computed_in = models.dtype_name(dtype) if is_local else None
    if None not in (settings.validated_in, computed_in) and settings.validated_in != computed_in:
        validated = f"it was validated in {settings.validated_in}, so a near tie may fall the other way"
        say(console, f"Computed in {computed_in}; {validated}")
    ledger, scratch = out.with_name(f"{out.name}.ledger.sqlite"), out.with_name(f"{out.name}.serve")
    check_ledger(ledger, progress.say)
    work = Assignment(ledger, scratch, progress, team, questions, settings, cluster)
    try:
        with progress.stage(out.name):
            by_member = work.answer(minutes)
    except TimeIsUpError:
        predictions = team.join({name: work.so_far(name) for name in team.members})
        write_atomic(out, submission(questions, predictions))
        count = f"{sum(prediction.letter is not None for prediction in predictions):,} of {len(questions):,} questions"
        say(console, f"Time is up. Wrote {out}: {count} answered, the first letter for the others")
        return
    predictions = team.join(by_member)
    write_atomic(out, submission(questions, predictions))
    right = [q.answer == p.letter for q, p in zip(questions, predictions, strict=True) if q.answer is not None]
    labelled = f", {sum(right):,} of {len(right):,} as labelled ({sum(right) / len(right):.1%})" if right else ""
    say(console, f"Wrote {out}: {len(questions):,} questions{labelled}")
    for name, answers in by_member.items():
        forced = [prediction.question_id for prediction in answers if prediction.answer is None]
        prefix = f"{name}: " if len(by_member) > 1 else ""
        _say_ids(console, forced, f"{prefix}answered by the likeliest letter, since no answer could be read")
    if expected is not None:
        machine = models.machine(dtype) if is_local else None
        say(console, f"Self-test: {selftest.check(expected, machine, predictions, questions)}")
    if least is not None and sum(right) < least * len(right):
        raise GateError(f"{source}: {sum(right):,} of {len(right):,} answers are as labelled, less than {least:.0%}")


class Assignment(NamedTuple):
    """Questions, and the team that answers them."""

    ledger: Path
    scratch: Path
    progress: Progress
    team: Team
    questions: Sequence[Question]
    settings: AnswerSettings
    cluster: Cluster | None

    def answer(self, minutes: float | None) -> dict[str, list[Prediction]]:
        """Every member's answers. Members' servers run side by side where this machine has room for them, otherwise one
        after the other.

        Raises:
            TimeIsUpError: after so many minutes; the ledger keeps what was answered.
        """
        members, serve, is_here = self.team.members, self.settings.serve, self.cluster is None
        stop = threading.Event()
        with _time_limit(minutes, stop):
            if len(members) > 1 and self.settings.predict.engine == "vllm" and is_here and not serve.base_url:
                shared = side_by_side_settings([*members.values()], serve)
                if shared is not None:
                    try:
                        return self._side_by_side(shared)
                    except ServeError as error:
                        self.progress.say(
                            f"the members could not be served side by side ({error}); now one after the other"
                        )
            with self._client(self.scratch, serve, self.progress, stop) as client:
                return {name: self._ask(client, name) for name in members}

    def _client(self, scratch: Path, serve: Serve, progress: Progress | Lane, stop: threading.Event) -> FolderClient:
        dtype = self.settings.predict.dtype
        return FolderClient(self.ledger, LEDGER_RUN, scratch, serve, dtype, progress, stop, self.cluster)

    def _side_by_side(self, serve: Serve) -> dict[str, list[Prediction]]:
        stop = threading.Event()
        lanes: dict[tuple[str, str], tuple[float, float]] = {}

        def answer_one(name: str) -> list[Prediction]:
            lane = Lane(self.progress, name, lanes)
            with self._client(self.scratch / name, serve, lane, stop) as client:
                return self._ask(client, name)

        with ThreadPoolExecutor(len(self.team.members)) as pool:
            futures = {name: pool.submit(answer_one, name) for name in self.team.members}
            try:
                for future in as_completed(futures.values()):
                    future.result()
            except BaseException:  # one failed, the time is up, or an interrupt: stop the others too
                stop.set()
                raise
        return {name: future.result() for name, future in futures.items()}

    def _ask(self, client: FolderClient, name: str) -> list[Prediction]:
        label = "answers" if len(self.team.members) == 1 else name
        return answer(client, self.team.members[name], self.questions, self.settings, label)

    def so_far(self, name: str) -> list[Prediction]:
        """A member's predictions from the answers that the ledger has until now."""
        return so_far(self.ledger, self.team.members[name], self.questions, self.settings)


class TimeIsUpError(BaseException):
    """The time limit is reached. A BaseException, like an interrupt, so that ``except Exception`` does not catch it."""


@contextlib.contextmanager
def _time_limit(minutes: float | None, stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` and raise TimeIsUpError inside the block once the time is up, without waiting for a server that is
    still writing or hangs."""

    def on_alarm(number: int, frame: FrameType | None) -> NoReturn:
        stop.set()
        raise TimeIsUpError

    if minutes is None:
        yield
        return
    previous_handler = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


def _read(source: Path, language: Language) -> list[Question]:
    return [question for problem in read_problems(source, language, labelled=False) for question in problem.questions]


def _check_disk(out: Path, answers: int) -> None:
    """Raise UserError where the ledger and the logs beside the answer file would not fit."""
    needed_bytes, free_bytes = answers * LEDGER_BYTES_PER_ANSWER + SPARE_BYTES, shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        sizes = f"{needed_bytes / 2**20:,.0f} MiB of disk space, and {free_bytes / 2**20:,.0f} MiB are free"
        raise UserError(f"{out.parent}: {answers:,} answers need {sizes}; free some, or name a file in another folder")


def _check_memory(weights: Path, settings: AnswerSettings) -> None:
    """Raise UserError where the host's memory is surely too small even for one answer at a time; out of memory, the
    process would be killed without a message."""
    try:
        shape = model_shape.read(weights)
    except ModelError:  # an architecture whose memory is not known
        return
    bytes_each = models.compute_dtype(settings.predict.dtype).itemsize
    needed_bytes = memory.answering(shape, 1, settings.predict.max_tokens, bytes_each=bytes_each).total
    if (free_bytes := free_on_host()) is not None and needed_bytes > free_bytes:
        sizes = f"{needed_bytes / 2**30:.1f} GiB of memory, and {free_bytes / 2**30:.1f} GiB are free"
        raise UserError(f"{weights}: answering takes {sizes}; end other programs, or use a larger machine")


def _unanswered(question: Question) -> Prediction:
    return Prediction(question_id=question.id, member="model", votes=(), answer=None, texts=())


def _say_ids(console: Console, ids: list[str], what: str) -> None:
    """Print how many questions there are of a kind, and the first of their ids."""
    if ids:
        more = f" and {len(ids) - MAX_IDS_NAMED:,} more" if len(ids) > MAX_IDS_NAMED else ""
        named = ", ".join(ids[:MAX_IDS_NAMED])
        say(console, f"{len(ids):,} {what}: {named}{more}")
