"""The architecture: what may import what, and that folders hold what their names say."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from test_docs import script

from stepladder import cli
from stepladder.context import STAGES

DOCS = Path(__file__).parent.parent / "docs"
SOURCE = Path(__file__).parent.parent / "src" / "stepladder"


architecture = script("architecture")
MODULES: dict[str, Path] = architecture.modules()
IMPORTS: dict[str, set[str]] = architecture.imports(MODULES)


def test_a_room_imports_only_from_floors_below() -> None:
    level = {name: number for number, floor in enumerate(architecture.FLOORS) for name in floor}
    wrong = [
        f"{name} must not import from {other}"
        for name, others in architecture.room_edges().items()
        for other in others
        if level[other] <= level[name]
    ]
    assert wrong == []


def test_the_drawing_is_of_these_imports() -> None:
    """Draw it again: python docs/architecture.py"""
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == architecture.draw()


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not inside a room either, and not by name or through a process of its own."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in IMPORTS[module]:
                if not module.startswith(f"{other}."):  # its own package, whose front door may list it
                    visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_stages_folder_is_the_flow() -> None:
    assert {path.stem for path in (SOURCE / "stages").glob("*.py")} == {*STAGES, "flow", "__init__"}


def test_the_commands_folder_is_the_command_line() -> None:
    commands = {
        str(command.name or command.callback.__name__) for command in cli.app.registered_commands if command.callback
    }
    files = {path.stem.rstrip("_").replace("_", "-") for path in (SOURCE / "commands").glob("[!_]*.py")}
    assert commands - {*STAGES} == files
    assert commands >= {*STAGES}


def test_no_class_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_only_the_ledger_and_the_index_of_pages_speak_sql() -> None:
    users = {path for path in SOURCE.rglob("*.py") if "sqlite3" in path.read_text(encoding="utf-8")}
    assert {path for path in users if path.parent != SOURCE / "ask" / "ledger"} == {SOURCE / "viewing" / "index.py"}


def test_status_waits_for_neither_scipy_nor_torch() -> None:
    code = f"""
import importlib, sys
from stepladder.commands import status
for name in {STAGES}:
    importlib.import_module(f"stepladder.stages.{{name}}")
print(sorted({{"scipy", "torch"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
