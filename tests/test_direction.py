"""Imports point one way: cli -> stages -> (mcq, ask, training, closedworld, reporting) -> the ground floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "stepladder"

GROUND = {
    "errors",
    "records",
    "config",
    "workspace",
    "progress",
    "stats",
    "models",
    "hubs",
    "template",
    "prefixes",
    "emulation",
    "supervise",
    "unpack",
    "memory",
    "__init__",
}
LAYERS = [
    {"__main__"},
    {"cli"},
    {"plan", "fits", "predicting", "packing"},
    {"selftest"},
    {"stages", "starter", "checkup", "spending", "labelaudit", "importing", "planning", "capacity", "pooling"},
    {"votes"},
    {"mcq", "ask", "training", "closedworld", "reporting", "ensembling", "serving"},
    GROUND,
]
MAY_ALSO = {
    # Tables, prices and prompts of one subject may use another's pure functions only where this list says so.
    ("reporting", "mcq"),
}


def layer(unit: str) -> int:
    return next(level for level, units in enumerate(LAYERS) if unit in units)


def imports(path: Path) -> set[str]:
    """First-level units of stepladder that a file imports, anywhere in it."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepladder":
            parts = node.module.split(".")
            units |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            units |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stepladder.")}
    return units


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_a_module_imports_only_from_below(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for unit in imports(path) - {own}:
        same_ground = own in GROUND and unit in GROUND
        assert same_ground or layer(unit) > layer(own) or (own, unit) in MAY_ALSO, f"{own} must not import {unit}"


def test_only_the_ledger_speaks_sql() -> None:
    users = [p.name for p in SOURCE.rglob("*.py") if "sqlite3" in p.read_text(encoding="utf-8")]
    assert users == ["ledger.py"]
