"""The process that renders templates, run as a script under ``python -I``: it confines itself, then answers lines.

A line in is ``{"sources": {name: text}, "chat": bool}``, which sets the templates, or ``{"name", "values": [...]}``,
which renders one with each of several sets of values; the line out is ``{"texts": [...]}``, or
``{"error", "file", "line"}``. The sandbox of Jinja2 keeps a template from Python's objects
(jinja.palletsprojects.com/sandbox); what it does not limit, time and memory, the process does.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.debug  # imported by Jinja2 when a template fails; by then no file can be opened
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

MEBIBYTES = 512
"""Of address space."""
MAX_CHARACTERS = 4_000_000
"""Of one rendering."""

WARM_UP = "{{ 'é' ~ '%s' % 1 ~ '{}'.format([1]|tojson) ~ strftime_now('%d %b %Y') }}{{ undefined.name }}"
"""Makes Python import what it imports late: afterwards no file can be opened."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` of chat templates, which marks what a model wrote: rendered as what it encloses."""

    tags = {"generation"}  # noqa: RUF012  (the attribute's form is Jinja2's)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def environment(sources: dict[str, str], *, chat: bool) -> jinja2.Environment:
    """Prompts are strict about undefined names. Chat templates get what transformers gives them."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FunctionLoader(lambda name: (sources[name], name, None) if name in sources else None),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.Undefined if chat else jinja2.StrictUndefined,
        extensions=[Generation, jinja2.ext.loopcontrols] if chat else [],
        autoescape=False,  # prompts are plain text for a model
    )
    if chat:
        made.filters["tojson"] = _tojson
        made.globals["raise_exception"] = _raise
        made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # as transformers has it
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def answer(
    templates: jinja2.Environment, sources: dict[str, str], name: str, values: list[dict[str, Any]]
) -> dict[str, Any]:
    """The rendered texts, or what went wrong and where."""
    try:
        template = templates.get_template(name)
        texts = [template.render(**each) for each in values]
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message, "file": error.name or error.filename or name, "line": error.lineno}
    except MemoryError:
        return {"error": f"it needs more than {MEBIBYTES} MiB", "file": name, "line": None}
    except Exception as error:  # noqa: BLE001  (a template is a program)
        # Jinja2 puts the templates' own lines into the traceback.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in sources]
        place = {"file": frames[-1].filename, "line": frames[-1].lineno} if frames else {"file": name, "line": None}
        return {"error": str(error)[:500] or type(error).__name__, **place}
    if max(map(len, texts)) > MAX_CHARACTERS:
        return {"error": f"it renders more than {MAX_CHARACTERS:,} characters", "file": name, "line": None}
    return {"texts": texts}


def serve(confine: Callable[[int], bool]) -> None:
    """Answer until standard input ends."""
    warm_up = {"warm-up": WARM_UP}
    answer(environment(warm_up, chat=True), warm_up, "warm-up", [{}])
    confine(MEBIBYTES)
    sources: dict[str, str] = {}
    templates = environment(sources, chat=False)
    for line in sys.stdin:
        message = json.loads(line)
        if "sources" in message:
            sources = message["sources"]
            templates = environment(sources, chat=message["chat"])
            continue
        sys.stdout.write(json.dumps(answer(templates, sources, message["name"], message["values"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from stepladder.isolation import confinement

    serve(confinement.confine)
