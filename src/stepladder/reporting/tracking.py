"""Passing a finished run on to a tracker, where a team keeps its other runs: members' curves, the figures and the page.

The tracker's own client library does it, with what its environment variables say (WANDB_API_KEY, MLFLOW_TRACKING_URI,
TRACKIO_SERVER_URL): docs.wandb.ai, mlflow.org/docs, huggingface.co/docs/trackio.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepladder.config import Track
from stepladder.documents import Document
from stepladder.errors import MissingExtra
from stepladder.reporting import words
from stepladder.reporting.content import Report
from stepladder.workspace import file_digest

CURVES = ("loss", "learning_rate", "validation_loss", "validation_accuracy")


class PassedOn(Document):
    """What a tracker has got already, so that it gets nothing twice."""

    FILE = ".passed_on.json"

    to: str
    project: str
    report: str
    """Digest of the page."""


def check(settings: Track) -> None:
    """Check that the tracker's library is installed.

    Raises:
        MissingExtra: it is not.
    """
    if importlib.util.find_spec(settings.to) is None:
        raise MissingExtra(settings.to, settings.to)


def pass_on(report: Report, page: Path, folder: Path, settings: Track) -> bool:
    """Pass a run's report on, unless the tracker has it; returns whether it was passed on.

    Args:
        report: its content.
        page: its HTML file.
        folder: the run's, which keeps what was passed on, and the files of trackers that write some.
        settings: ``[track]``.

    Raises:
        Exception: of the tracker's library, whatever went wrong there.
    """
    sent = PassedOn(to=settings.to, project=settings.project, report=file_digest(page))
    if (folder / PassedOn.FILE).exists() and PassedOn.read(folder, "delete it") == sent:
        return False
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        TRACKERS[settings.to](report, page, folder, settings.project)
    sent.write(folder)
    return True


def curves(report: Report) -> dict[int, dict[str, float]]:
    """The members' curves by optimiser step; names are ``MEMBER/loss`` and so on."""
    steps: dict[int, dict[str, float]] = {}
    for member in report.training:
        for row in (*member.log, *member.validation):
            values = {name: getattr(row, name) for name in CURVES}
            named = {f"{member.member}/{name}": value for name, value in values.items() if value is not None}
            steps.setdefault(row.step, {}).update(named)
    return dict(sorted(steps.items()))


def figures(report: Report) -> dict[str, float]:
    """Accuracies and costs by name: ``test/4-bit m1``."""
    accuracies = {f"{row.split}/{words.name(row, report.run.bits)}": row.accuracy for row in report.results}
    return accuracies | {
        "cost/dollars": sum(stage.dollars for stage in report.stages),
        "cost/seconds": sum(stage.seconds for stage in report.stages),
    }


def _to_wandb(report: Report, page: Path, folder: Path, project: str) -> None:
    wandb: Any = importlib.import_module("wandb")
    with wandb.init(
        project=project, name=report.run.name, dir=folder, settings=wandb.Settings(silent=True, console="off")
    ) as run:
        for step, values in curves(report).items():
            run.log(values, step=step)
        run.summary.update(figures(report))
        artifact = wandb.Artifact(f"{report.run.name}-report", type="report")
        artifact.add_file(str(page))
        run.log_artifact(artifact)


def _to_mlflow(report: Report, page: Path, folder: Path, project: str) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(project)
    with mlflow.start_run(run_name=report.run.name):
        for step, values in curves(report).items():
            mlflow.log_metrics(values, step=step)
        mlflow.log_metrics(figures(report))
        mlflow.log_artifact(str(page))


def _to_trackio(report: Report, page: Path, folder: Path, project: str) -> None:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project=project, name=report.run.name, embed=False)
    last = 0
    for step, values in curves(report).items():
        trackio.log(values, step=step)
        last = step
    trackio.log(figures(report), step=last)  # it has no summary
    trackio.save(page, project=project)
    trackio.finish()


TRACKERS: dict[str, Callable[[Report, Path, Path, str], None]] = {
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
}
