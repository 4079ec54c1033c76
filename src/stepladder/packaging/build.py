"""Making the package of a run: copies of models and prompts, wheels, self-test, and files rendered from templates."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import ClassVar, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

import stepladder
from stepladder import models, records
from stepladder.answering import team as teams
from stepladder.answering.standalone import PROMPTS, read_settings
from stepladder.answering.team import Team
from stepladder.config import Config
from stepladder.context import Context
from stepladder.documents import Document, EnsembleChoice
from stepladder.errors import UserError
from stepladder.isolation.folders import check_inside, files_inside
from stepladder.packaging import papers, selftest, wheels
from stepladder.records import Language, Prediction, Question, Record
from stepladder.reporting.content import Weights
from stepladder.reporting.data_card import student_name
from stepladder.reporting.model_card import base_name, licence_of
from stepladder.stages.flow import states
from stepladder.stages.quantised import verdict
from stepladder.stages.trainset import member
from stepladder.workspace import MANIFEST, digest, file_digest, new_folder, write_atomic

SCRIPTS = ("run.sh", "serve.sh", "selftest.sh", "install.sh", "healthcheck")
OTHER_FILES = ("README.md", "Dockerfile", "compose.yaml", ".dockerignore")
CHECKSUMS = "SHA256SUMS"
EXTRAS = {"local": "local", "vllm": "serve"}
"""The extra of Stepladder that is installed, by engine."""

Engine = Literal["local", "vllm"]


class MemberAccuracy(Record):
    """A member's accuracy on the ``n`` validation questions, before and after quantising."""

    merged: float
    quantised: float
    n: int


class PackageManifest(Document):
    """What a package was made from, and for."""

    FILE: ClassVar[str] = MANIFEST

    name: str
    """Of the run."""
    made_by: str
    language: Language
    engine: Engine
    dtype: Mapping[str, str]
    """The number format that each artifact of the run was computed in."""
    selftest: bool
    """Whether the package holds what it answered where it was made."""
    image: str | None
    pythons: tuple[str, ...]
    base: str
    rule: str
    leader: str
    models: Mapping[str, str]
    """Digest of each member's weights."""
    prompts: str
    """Digest of the prompts."""
    longest: int
    """Longest prompt and answer together, tokens."""
    validation: Mapping[str, MemberAccuracy]
    """Of the chosen weights, by member."""
    ensemble: str
    """Digest of the run's ensemble."""
    weights: Weights = "chosen"
    """Which weights are packed. Final ones learned from the validation labels, so ``validation`` is not theirs."""


def pack(context: Context, out: Path, engine: Engine | None, image: str | None, pythons: Sequence[str]) -> Path:
    """Make the package of a finished run.

    Args:
        context: the run.
        out: the folder to make; it must not be there.
        engine: what computes there; by default what the run was validated with.
        image: base of the Docker image, pinned by its digest; without one, ``docker build`` needs it as an argument.
        pythons: versions of Python that wheels are included for, such as ``"3.12"``.

    Raises:
        UserError: the folder is there, the run is not finished, or wheels cannot be downloaded or built.
    """
    if image is not None and "@sha256:" not in image:
        raise UserError(f"--image {image!r}: has no digest; name it as NAME@sha256:..., which pins one image")
    with new_folder(out) as partial:
        team = _team(context)
        _fill(context, partial, team, engine or context.config.predict.engine, image, pythons)
    return out


def _team(context: Context) -> Team:
    """The members that the run chose, their rule, and the answers it is fitted on."""
    for place, state in states(context):
        if state != "done" and place.stage != "report":
            raise UserError(
                f"{context.workspace.folder}: {place.label} is {state}; '{context.run_command}' brings it up to date"
            )
    choice = EnsembleChoice.read(context.input("ensemble"))
    names = choice.answering
    members = {name: _packed(context).input("quantised", name) for name in names}
    if choice.rule == "single":
        return Team(members, leader=choice.leader)
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    predictions = {
        name: records.read(context.input("predictions", name) / "quantised.validation.jsonl", Prediction)
        for name in names
    }
    return Team(members, choice.rule, choice.leader, teams.validation_answers(questions, predictions))


def _packed(context: Context) -> Context:
    """The context of the weights that are packed: the final ones where there are some."""
    return context.final if context.config.final == "all" else context


def _fill(
    context: Context, folder: Path, team: Team, engine: Engine, image: str | None, pythons: Sequence[str]
) -> None:
    config, progress = context.config, context.progress
    for name, weights in team.members.items():
        progress.update(f"copies {name}", 0, 1)
        files_inside(weights)  # what a link leads to would be given away
        shutil.copytree(weights, folder / teams.WEIGHTS / name, ignore=lambda _, names: {MANIFEST} & {*names})
    packed = team._replace(members={name: folder / teams.WEIGHTS / name for name in team.members})
    teams.write(folder, packed)
    _prompts(config, folder / PROMPTS)
    write_atomic(folder / selftest.QUESTIONS, _selftest(context, team))
    if config.predict.engine == "local":  # a server's answers depend on what else is in its batch
        progress.update("self-test", 0, 1)
        selftest.record(folder, progress)

    progress.update("wheels", 0, 1)
    (folder / "wheels").mkdir()
    wheels.collect(folder / "wheels", EXTRAS[engine], pythons)
    write_atomic(folder / "requirements.lock", wheels.lock(folder / "wheels"))
    for short, content in papers.licences(folder / "wheels"):
        _write(folder / "licenses" / short, content)
    parents = {name: student_name(config, member(config, name)) for name in packed.members}
    licences = {parent: licence_of(parent, models.locate(parent)) for parent in dict.fromkeys(parents.values())}
    licence_notes = (
        f"{base_name(parent)}: {licence or 'its folder names no licence'}; the models derived from it are under the "
        "same.\n"
        for parent, licence in licences.items()
    )
    _write(folder / "licenses" / "model" / "README", "".join(licence_notes).encode())
    for index, base in enumerate(map(models.locate, licences)):
        for path in base.glob("LICEN[CS]E*"):
            check_inside(path, base)
            # The first model's beside the note; those of others, which may have the same names, in folders.
            place = folder / "licenses" / "model" / (str(index + 1) if index else "")
            _write(place / path.name, path.read_bytes())
    packed_models = [
        papers.PackedModel(name, models.content_digest(weights), base_name(parents[name]), licences[parents[name]])
        for name, weights in packed.members.items()
    ]
    (folder / "sbom").mkdir()
    bill = papers.bill(folder / "wheels", packed_models, config.name, _packed(context).digest_of("ensemble")[:12])
    write_atomic(folder / "sbom" / "package.cdx.json", bill)

    package = _manifest(context, folder, packed, engine, image, pythons, packed_models)
    package.write(folder)
    for name, text in _rendered(folder, packed, package):
        write_atomic(folder / name, text)
        if name in SCRIPTS:
            (folder / name).chmod(0o755)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    write_atomic(folder / CHECKSUMS, "".join(f"{file_digest(folder / name)}  {name}\n" for name in files))
    for path in (folder, *folder.rglob("*")):  # other users may run it
        path.chmod(path.stat().st_mode | stat.S_IRGRP | stat.S_IROTH | (0o11 if path.is_dir() else 0))


def _prompts(config: Config, folder: Path) -> None:
    """Copy the prompt templates: the packaged ones, overwritten by the user's."""
    packaged = Path(stepladder.__file__).parent / "mcq" / "prompts" / config.language
    shutil.copytree(packaged, folder)
    if config.student_prompts is not None:
        files_inside(config.student_prompts)
        shutil.copytree(config.student_prompts, folder, dirs_exist_ok=True)


def _selftest(context: Context, team: Team) -> str:
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    packed = _packed(context)
    joined = records.read(packed.input("ensemble") / "validation.jsonl", Prediction)
    predictions = [joined] + [
        records.read(packed.input("predictions", name) / f"{system}.validation.jsonl", Prediction)
        for name in team.members
        for system in ("merged", "quantised")
    ]
    return selftest.labelled_problems(questions, predictions)


def _manifest(
    context: Context,
    folder: Path,
    team: Team,
    engine: Engine,
    image: str | None,
    pythons: Sequence[str],
    packed_models: list[papers.PackedModel],
) -> PackageManifest:
    config = context.config
    verdicts = {name: verdict(context, name) for name in team.members}
    manifest = PackageManifest(
        name=config.name,
        made_by=f"stepladder {stepladder.__version__}",
        language=config.language,
        engine=engine,
        dtype=context.number_formats(),
        selftest=(folder / selftest.ExpectedAnswers.FILE).is_file(),
        image=image,
        pythons=tuple(pythons),
        base=base_name(config.train.base),
        rule=team.rule,
        leader=team.leader,
        models={model.name: model.digest for model in packed_models},
        prompts=digest({path.name: file_digest(path) for path in _files(team.members[team.leader].parents[1])}),
        longest=read_settings(team.members[team.leader], None).serve.max_length,
        validation={
            name: MemberAccuracy(merged=measured.merged, quantised=measured.quantised, n=measured.n)
            for name, measured in verdicts.items()
        },
        ensemble=_packed(context).digest_of("ensemble"),
    )
    return manifest.model_copy(update={"weights": "final"}) if config.final == "all" else manifest


def _files(package: Path) -> list[Path]:
    return sorted(path for path in (package / PROMPTS).rglob("*") if path.is_file())


def _rendered(folder: Path, team: Team, package: PackageManifest) -> Iterator[tuple[str, str]]:
    """Name and text of each file that is made from a template."""
    templates = Environment(  # not HTML: these are scripts and Markdown
        loader=PackageLoader("stepladder.packaging", "files"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701
    )
    layers = {name: _layers(folder, weights) for name, weights in team.members.items()}
    for name in (*SCRIPTS, *OTHER_FILES):
        yield name, templates.get_template(f"{name.removeprefix('.')}.j2").render(package=package, layers=layers)


def _layers(folder: Path, weights: Path) -> list[list[str]]:
    """A member's files by layer of the Docker image: each shard of weights alone, then all small files together."""
    files = sorted(path for path in weights.rglob("*") if path.is_file() and PurePath(PROMPTS).name not in path.parts)
    small = [path.relative_to(folder).as_posix() for path in files if path.suffix != ".safetensors"]
    shards = [path.relative_to(folder).as_posix() for path in files if path.suffix == ".safetensors"]
    return [[shard] for shard in shards] + [small]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
