"""``stepladder predict``: a model folder and a file of questions in, the contest's answer file out, without a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from rich.console import Console

from stepladder import models
from stepladder.config import Serve
from stepladder.errors import UserError
from stepladder.progress import Progress
from stepladder.records import Language, Prediction, Question
from stepladder.stages.answering import answer, manner, so_far
from stepladder.stages.asking import Desk
from stepladder.stages.ensemble import submission
from stepladder.stages.questionfile import read_problems
from stepladder.workspace import write_atomic

NAMED = 10
"""Ids that a line names; the rest are counted."""


def predict(
    model: str,
    source: Path,
    out: Path,
    console: Console,
    *,
    language: Language | None = None,
    engine: Literal["local", "vllm"] = "local",
    votes: int | None = None,
    serve: Serve | None = None,
    minutes: float | None = None,
) -> None:
    """Answer every question of a file and write one line a problem: its id, and a letter for each of its questions.

    Answers are kept beside ``out``, in ``<out>.ledger.sqlite``, so that a killed command goes on where it was.

    Args:
        model: the folder, or an id on a hub.
        source: JSONL in the contest's form.
        out: what is written, at once, when all is answered.
        console: where progress is shown.
        language: of the prompts, where the folder does not tell it.
        engine: who computes.
        votes: instead of the number the model was validated with.
        serve: how servers are started.
        minutes: how long it may take. A whole file of first letters is written at once and replaced at the end; when
            the time is up, by what was answered until then.

    Raises:
        InputError: a file is wrong, naming line and field.
        ModelError, TemplateError, ServeError: the model cannot be asked.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name a file in another one")
    weights = models.locate(model)
    how = manner(weights, language)
    if votes is not None:
        how = how._replace(predict=how.predict.model_copy(update={"votes": votes}))
    questions = [q for problem in read_problems(source, how.language, labelled=False) for q in problem.questions]
    progress = Progress(console)
    beside = out.with_name(f"{out.name}.ledger.sqlite")
    desk = Desk(beside, "predict", out.with_name(f"{out.name}.serve"), serve or Serve(), progress)
    if minutes is not None:
        write_atomic(out, submission(questions, [_unanswered(question) for question in questions]))
    try:
        with progress.stage(out.name), _limit(minutes):
            done = answer(desk, weights, questions, how, engine)
    except TimeIsUpError:
        known = so_far(desk, weights, questions, how)
        write_atomic(out, submission(questions, known))
        count = f"{sum(one.answer is not None for one in known):,} of {len(questions):,} questions"
        said = f"Time is up. Wrote {out}: {count} answered, the first letter for the others"
        console.print(said, soft_wrap=True, markup=False, highlight=False)
        return
    write_atomic(out, submission(questions, done.predictions))
    console.print(f"Wrote {out}: {len(questions):,} questions", soft_wrap=True, markup=False, highlight=False)
    _say(console, done.mended, "answered when asked again")
    _say(console, done.likeliest, "answered by the likeliest option, since nothing that was said could be read")


class TimeIsUpError(BaseException):
    """The limit is reached. Like an interrupt, nothing that catches errors may catch it."""


@contextlib.contextmanager
def _limit(minutes: float | None) -> Iterator[None]:
    """Raise TimeIsUpError in this block once the time is up."""

    def ring(number: int, frame: FrameType | None) -> NoReturn:
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


def _unanswered(question: Question) -> Prediction:
    return Prediction(question_id=question.id, member="model", votes=(), answer=None, texts=())


def _say(console: Console, ids: list[str], what: str) -> None:
    if ids:
        more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
        named = ", ".join(ids[:NAMED])
        console.print(f"{len(ids):,} {what}: {named}{more}", soft_wrap=True, markup=False, highlight=False)
