"""The reference, written from the code: ``python docs/reference.py`` writes docs/reference/.

configuration.md comes from the docstrings of config/schema.py, command-line.md from what ``--help`` says.
tests/test_docs.py holds the files against this script.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stepladder import cli
from stepladder.config import Config, Table

FOLDER = Path(__file__).with_name("reference")
NOTE = "<!-- Written by docs/reference.py; change the code instead. -->\n\n"
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def configuration() -> str:
    """Every table of the TOML file with its keys."""
    intro = "One TOML file is one run. Unknown keys are errors. Paths are relative to the file.\n"
    lines = ["# Configuration\n", NOTE + intro]
    lines += ["## The file\n", *_keys(Config)]
    for name, field in Config.model_fields.items():
        lines += _table(name, field, ())
    return "\n".join(lines) + "\n"


def _table(name: str, field: FieldInfo, path: tuple[str, ...]) -> Iterator[str]:
    table, many, named = _held(field.annotation)
    if table is None:
        return
    full = (*path, name)
    if path and not many:  # a table written inline, such as price
        title = f"`{name} = {{ ... }}` in `[{'.'.join(path)}]`"
    else:
        title = f"`[[{'.'.join(full)}]]`" if many else f"`[{'.'.join(full)}{'.NAME' if named else ''}]`"
    yield f"## {title}\n"
    yield f"{_text(re.sub(r'^``.*?``: ', '', table.__doc__ or ''), capital=True)}\n"
    yield from _keys(table)
    for inner, inner_field in table.model_fields.items():
        yield from _table(inner, inner_field, (*full, "NAME") if named else full)


def _keys(table: type[Table]) -> Iterator[str]:
    yield "| key | value | default | what it is |"
    yield "|---|---|---|---|"
    # A table's own keys first, then those that it shares with others.
    for name, field in sorted(table.model_fields.items(), key=lambda item: item[0] not in table.__annotations__):
        if _held(field.annotation)[0] is None:
            cells = (f"`{name}`", _value(field), _default(field), _text(field.description or ""))
            yield f"| {' | '.join(map(_cell, cells))} |"
    yield ""


def _held(annotation: Any) -> tuple[type[Table] | None, bool, bool]:
    """The table that a field holds; whether there may be many of it, and whether each has a name."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation, False, False
    for part in get_args(annotation):
        table, _, _ = _held(part)
        if table is not None:
            return table, get_origin(annotation) is tuple, get_origin(annotation) is dict
    return None, False, False


def _value(field: FieldInfo) -> str:
    bounds = [
        f"{word} {getattr(each, name):g}"
        for each in field.metadata
        for name, word in BOUNDS.items()
        if hasattr(each, name)
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{_toml(value)}`" for value in args)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin is dict:
        return "table"
    if origin is tuple:
        return f"list of {_kind(args[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in args if part is not type(None))
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    return "" if value is PydanticUndefined or value is None or value == () else f"`{_toml(value)}`"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


def command_line() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(cli.app)
    context = typer.Context(root, info_name="stepladder")
    lines = ["# Command line\n", NOTE + f"{root.help}\n"]
    commands = {name: root.get_command(context, name) for name in root.list_commands(context)}  # type: ignore[attr-defined]
    lines += ["| command | |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {_cell(command.help or '')} |" for name, command in commands.items()]
    for name, command in commands.items():
        lines += [f"\n## {name}\n", f"{command.help}\n"]
        inner = typer.Context(command, parent=context, info_name=name)
        lines += [f"```\n{' '.join(command.get_usage(inner).removeprefix('Usage: ').split())}\n```\n"]
        shown = [parameter for parameter in command.params if parameter.name != "help"]
        if shown:
            lines += ["| | what it is | default |", "|---|---|---|"]
        for parameter in shown:
            record = parameter.get_help_record(inner) or (parameter.make_metavar(inner), "")
            default = "" if parameter.required or parameter.default in (None, ()) else f"`{parameter.default}`"
            spelling = ", ".join(parameter.opts) if parameter.param_type_name == "option" else record[0]
            text = getattr(parameter, "help", "") or ""
            lines.append(f"| `{spelling}` | {_cell(text)} | {_cell(default)} |")
    return "\n".join(lines) + "\n"


def _text(docstring: str, *, capital: bool = False) -> str:
    """A docstring as one line of Markdown."""
    text = re.sub(r"``(.+?)``", r"`\1`", " ".join(docstring.split()))
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text[:1].upper() + text[1:] if capital else text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def pages() -> dict[str, str]:
    """File names below docs/reference/ and what stands in them."""
    return {"configuration.md": configuration(), "command-line.md": command_line()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in pages().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
        print(f"Wrote {FOLDER / file}")
