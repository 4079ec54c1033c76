"""The architecture, read from the imports: ``python docs/architecture.py`` draws docs/architecture.svg.

A room is a folder of the package, or a module beside them. tests/test_direction.py holds the floors against the real
imports, and the picture against this script.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "stepladder"
PICTURE = Path(__file__).with_suffix(".svg")

FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("exporting", "packaging", "rehearsal", "smoke", "viewing"),
    ("stages",),
    ("quantising",),
    ("training", "answering"),
    ("serving",),
    ("forecast",),
    ("ask", "reporting", "shards"),
    ("context",),
    ("models", "mcq", "ensembling", "closedworld", "nodes"),
    ("config",),
    ("documents",),
    ("isolation", "files"),
    ("workspace", "records", "progress"),
    ("terminal",),
    ("errors", "stats", "supervise", "text"),
)
"""Rooms, the highest floor first. A room imports from floors below it, never from its own or from above."""
GROUND = {name for floor in FLOORS[-3:] for name in floor}
STAGES = "stages.flow"
"""The module that imports the stages by their names."""


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package; the package itself is the empty name."""
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """For each module those it imports, anywhere in it, by name (``importlib``) or as a process (``python -m``)."""
    edges = {module: {name for name in _named(path) if name in known} - {module} for module, path in known.items()}
    edges[STAGES] |= {module for module in known if module.startswith("stages.")} - {STAGES}
    return edges


def _named(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^stepladder[.\w]+$", node.value)
        for name in names:
            package, _, below = name.partition(".")
            if package == "stepladder":
                path_of = SOURCE.joinpath(*below.split("."))
                is_module = path_of.is_dir() or path_of.with_suffix(".py").is_file()
                yield below if is_module else below.rpartition(".")[0]


def room(module: str) -> str:
    """The room that a module is in."""
    return module.partition(".")[0]


def room_edges() -> dict[str, set[str]]:
    """For each room those it imports from."""
    edges: dict[str, set[str]] = {name: set() for floor in FLOORS for name in floor}
    for module, others in imports(modules()).items():
        if room(module):
            edges[room(module)] |= {room(other) for other in others if room(other)} - {room(module)}
    return edges


# The picture

WIDTH, ROW, GAP, MARGIN = 1000, 60, 26, 16
PER_LINE = 3.6
"""Pixels of width for each character of a room's list of modules, which is set on two lines."""


def draw() -> str:
    """The picture as SVG: a row a floor, a box a room with what is in it, an arrow for imports that no chain of other
    arrows implies. Arrows to the :data:`GROUND`, which everything may use, are left out."""
    inside: dict[str, list[str]] = {name: [] for floor in FLOORS for name in floor}
    for module in modules():
        if room(module) and "." in module:
            name = module.split(".")[1]
            if name not in inside[room(module)]:
                inside[room(module)].append(name)
    floors = [floor for floor in FLOORS if floor != ("__main__",)]
    height = 2 * MARGIN + len(floors) * (ROW + GAP) - GAP
    boxes = {}
    for row, floor in enumerate(floors):
        widths = [max(120.0, PER_LINE * len(" ".join(inside[name])) + 40) for name in floor]
        scale = min(1.0, (WIDTH - 2 * MARGIN - GAP * (len(floor) - 1)) / sum(widths))
        left = (WIDTH - sum(widths) * scale - GAP * (len(floor) - 1)) / 2
        for name, width in zip(floor, widths, strict=True):
            boxes[name] = (left, MARGIN + row * (ROW + GAP), width * scale)
            left += width * scale + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>Rooms of the package, and which import from which</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#7a8ca5"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    edges = {name: others - GROUND for name, others in room_edges().items() if name in boxes}
    lines += [_arrow(boxes[name], boxes[other]) for name, other in _needed(edges)]
    for name, (left, top, width) in boxes.items():
        lines.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" rx="6" fill="#eef3fa" '
            'stroke="#34507a"/>'
        )
        middle = left + width / 2
        rows = _wrapped(inside[name], width)
        start = top + ROW / 2 + 5 - 7 * len(rows)
        lines.append(
            f'<text x="{middle:.1f}" y="{start:.1f}" text-anchor="middle" font-size="15" font-weight="bold" '
            f'fill="#16263f">{html.escape(name)}</text>'
        )
        lines += [
            f'<text x="{middle:.1f}" y="{start + 15 + 13 * number:.1f}" text-anchor="middle" font-size="11" '
            f'fill="#3d4f69">{html.escape(text)}</text>'
            for number, text in enumerate(rows)
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _wrapped(names: list[str], width: float) -> list[str]:
    rows: list[str] = []
    for name in names:
        if rows and len(rows[-1]) + len(name) + 2 <= width / 5.7:
            rows[-1] += f"  {name}"
        else:
            rows.append(name)
    return rows


def _needed(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The edges that no path of others implies (transitive reduction)."""

    def reach(name: str) -> set[str]:
        return edges[name].union(*(reach(other) for other in edges[name])) if edges[name] else set()

    return [
        (name, other)
        for name, others in edges.items()
        for other in sorted(others)
        if not any(other in reach(between) for between in others - {other})
    ]


def _arrow(box: tuple[float, float, float], other: tuple[float, float, float]) -> str:
    """From the bottom of a box to the top of another, entering where it is nearest."""
    start = min(max(other[0] + other[2] / 2, box[0] + 12), box[0] + box[2] - 12)
    end = min(max(start, other[0] + 12), other[0] + other[2] - 12)
    return (
        f'<path d="M{start:.1f},{box[1] + ROW} L{end:.1f},{other[1] - 1}" stroke="#7a8ca5" stroke-width="1.4" '
        'fill="none" marker-end="url(#tip)"/>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"Wrote {PICTURE}")
