"""Every import leads down the floors of docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "ofa"

FLOORS = (
    "__main__",
    "cli",
    "commands",
    "report sklearn",
    "comparison adaptation",
    "methods",
    "training",
    "probing adapters",
    "regularizers tuning",
    "anatomy evaluation",
    "models tasks",
    "files sharding hub",
    "errors logs threads _version _lazy",
)
"""From the top down. A room imports only from the floors below its own."""

FLOOR_OF = {room: -index for index, floor in enumerate(FLOORS) for room in floor.split()}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]  # the face is imported by none


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every own module that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ofa":
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def test_every_room_has_a_floor() -> None:
    assert {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES} == set(FLOOR_OF)


def test_imports_lead_down() -> None:
    wrong = []
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        rooms = {module.split(".")[1] for module in imports(path) if module != "ofa"} - {own}
        wrong += [f"{module_of(path)} → {room}" for room in sorted(rooms) if FLOOR_OF[room] >= FLOOR_OF[own]]
    assert wrong == []


def test_imports_have_no_cycle() -> None:
    faces = {module_of(path) for path in FILES if path.name == "__init__.py"}
    graph = {module_of(path): set(imports(path)) - faces for path in FILES if path.name != "__init__.py"}
    TopologicalSorter(graph).prepare()  # raises CycleError
