"""Reading a run's TOML file: one-line errors, and paths relative to the file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from stepladder import files
from stepladder.config.addresses import HUB_ID, without_password
from stepladder.config.engines import with_engine
from stepladder.config.schema import Config, General, Rung, Table
from stepladder.errors import ConfigError

MAX_BYTES = 1_000_000
"""Of a TOML file."""


def load(path: Path) -> Config:
    """Read and check a TOML file; relative paths in it start at the file's folder.

    Raises:
        ConfigError: one line naming file, key and what is allowed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES:,} bytes; name a TOML file")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; 'stepladder init' writes an example") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}; correct that place") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply; the keys have three levels at most") from None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    root = path.parent
    questions = config.questions.model_copy(
        update={
            "train": files.beside(root, config.questions.train),
            "test": None if config.questions.test is None else files.beside(root, config.questions.test),
            "reviewed": None if config.questions.reviewed is None else root / config.questions.reviewed,
        }
    )
    models = {
        name: model.model_copy(
            update={
                **({} if model.path is None else {"path": _beside(root, model.path)}),
                **({} if model.base_url_file is None else {"base_url_file": root / model.base_url_file}),
                "prompts": _templates(path, f"models.{name}.prompts", model.prompts),
            }
        )
        for name, model in config.models.items()
    }
    train = config.train.model_copy(update={"base": _beside(root, config.train.base)})
    general = tuple(_resolved(path, part) for part in config.quantise.general)
    quantise = config.quantise.model_copy(update={"general": general})
    predict = config.predict.model_copy(update={"prompts": _templates(path, "predict.prompts", config.predict.prompts)})
    cluster = config.cluster
    if cluster is not None and cluster.ledger is not None:
        cluster = cluster.model_copy(update={"ledger": root / cluster.ledger})
    return config.model_copy(
        update={
            "cluster": cluster,
            "questions": questions,
            "models": models,
            "train": train,
            "quantise": quantise,
            "member": tuple(
                member
                if member.path is None
                else member.model_copy(update={"path": _beside(root, str(Path(member.path).expanduser()))})
                for member in config.member
            ),
            "rung": tuple(_with_chains(path, rung) for rung in config.rung),
            "predict": with_engine(predict, config.serve),
            "prompts": _templates(path, "prompts", config.prompts),
        }
    )


def _with_chains(file: Path, rung: Rung) -> Rung:
    """The rung with its file of chains where it is.

    Raises:
        ConfigError: there is no such file.
    """
    if rung.chains is None:
        return rung
    chains = file.parent / rung.chains
    if not chains.is_file():
        raise ConfigError(
            f"{file}: rung {rung.name!r}, key 'chains': {chains} is not a file; name one of chains (JSONL)"
        )
    return rung.model_copy(update={"chains": chains})


def _templates(file: Path, key: str, folder: Path | None) -> Path | None:
    """The folder of templates that a key of the TOML file names, relative to the file.

    Raises:
        ConfigError: it is not a folder.
    """
    if folder is None:
        return None
    templates = file.parent / folder
    if not templates.is_dir():
        raise ConfigError(f"{file}: key {key!r}: {templates} is not a folder; name one with templates (*.j2)")
    return templates


def _resolved(path: Path, part: General) -> General:
    """A source of general text: a file beside the TOML file ``path``, or a dataset with its data file.

    Raises:
        ConfigError: it is neither.
    """
    file = path.parent / part.source
    if part.file is None and not file.is_file():
        raise ConfigError(
            f"{path}: key 'quantise.general.source': there is no file {part.source!r}; where it is a dataset of a hub, "
            'name its data file as well, such as file = "data.jsonl"'
        )
    if part.file is not None and (file.is_file() or HUB_ID.fullmatch(part.source) is None):
        raise ConfigError(
            f"{path}: key 'quantise.general.file': {part.source!r} is no dataset of a hub (OWNER/NAME or "
            "modelscope:OWNER/NAME); leave 'file' out, or correct 'source'"
        )
    return part if part.file is not None else part.model_copy(update={"source": str(file)})


def _beside(root: Path, name: str) -> str:
    """The path of the folder of this name beside the TOML file; where there is none, the name as it is (a hub's id, for
    example)."""
    return str(root / name) if (root / name).is_dir() else name


def _first_problem(error: ValidationError) -> str:
    """The first problem as one line: dotted key, what is wrong, what is allowed.

    Unknown keys go first: a misspelt key is reported as unknown and as missing, and the spelling is the cause.
    """
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        table, keys = _valid_keys(problem["loc"])
        return f"unknown key '{key}'; {table} knows: {keys}"
    if problem["type"] == "missing":
        return f"missing key '{key}'; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    # A whole table as value would hide the message.
    got = problem["input"]
    value = (
        "" if isinstance(got, dict | list) else f" (got {(without_password(got) if isinstance(got, str) else got)!r})"
    )
    return f"key '{key}': {message}{value}"


def _valid_keys(location: tuple[int | str, ...]) -> tuple[str, str]:
    """The table that an unknown key is in, and its valid keys."""
    table: type[Table] = Config
    path: list[str] = []
    for part in location[:-1]:
        if isinstance(part, str) and part in table.model_fields:
            table = _table_in(table.model_fields[part].annotation) or table
            path.append(part)
    name = f"[{'.'.join(path)}]" if path else "the file"
    return name, ", ".join(table.model_fields)


def _table_in(annotation: Any) -> type[Table] | None:
    """The table class in a field's annotation: alone, optional, or as items of a tuple or dictionary."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    tables = (_table_in(part) for part in get_args(annotation))
    return next((table for table in tables if table is not None), None)
