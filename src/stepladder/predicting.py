"""``stepladder predict``: a model folder and a file of questions in, the contest's answer file out, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from stepladder import models
from stepladder.config import Serve
from stepladder.errors import UserError
from stepladder.progress import Progress
from stepladder.records import Language
from stepladder.stages.answering import answer, manner
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
    with progress.stage(out.name):
        done = answer(desk, weights, questions, how, engine)
    write_atomic(out, submission(questions, done.predictions))
    console.print(f"Wrote {out}: {len(questions):,} questions", soft_wrap=True, markup=False, highlight=False)
    _say(console, done.mended, "answered when asked again")
    _say(console, done.likeliest, "answered by the likeliest option, since nothing that was said could be read")


def _say(console: Console, ids: list[str], what: str) -> None:
    if ids:
        more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
        named = ", ".join(ids[:NAMED])
        console.print(f"{len(ids):,} {what}: {named}{more}", soft_wrap=True, markup=False, highlight=False)
