"""Imports run one way: from the tools down to what knows nothing of the rest. Lazy and typing-only imports count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

SOURCE = Path(__file__).parents[1] / "src"

LEVELS = [
    {"tools", "__main__"},
    {"api", "pair", "equalisation", "reporting", "__init__"},
    {"restructuring"},
    {"planner", "checkpoint"},
    {"fusion_plan"},
    {"exported"},
    {"analysis", "solve", "verify", "transaction"},
    {"capture", "rules"},
    {"model", "graph", "printing"},
    {"changes"},
    {"reasons", "units", "operators", "errors"},
]
"""Rooms, a level each line: a room imports from lower levels, and from itself."""

ALLOWED = {
    ("pair", "api"),
    ("__init__", "api"),
    ("__init__", "pair"),
    ("__init__", "equalisation"),
    ("__init__", "reporting"),
    ("reporting", "api"),
    ("__main__", "tools"),
}
"""Imports within a level."""

NEVER = {"rules": {"model"}, "solve": {"model"}, "verify": {"graph"}}


def files() -> dict[str, Path]:
    """Every file of the library by its dotted name; a package goes by its own."""
    found = {}
    for path in sorted((SOURCE / "bnfuse").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(text: str, known: set[str]) -> set[str]:
    """The files of the library that a text imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known


def room(name: str) -> str:
    return (*name.split("."), "__init__")[1]


def level(name: str) -> int:
    [place] = [place for place, rooms in enumerate(LEVELS) if room(name) in rooms]
    return place


def problem(name: str, imported: str) -> str:
    """Why one file must not import another, empty if it may."""
    mine, other = room(name), room(imported)
    if mine == other or (mine, other) in ALLOWED:
        return ""
    if other in NEVER.get(mine, ()):
        return f"{name} must know nothing of {imported}"
    return "" if level(name) < level(imported) else f"{name} must not import {imported}"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = files()
    return {name: imports(path.read_text(), set(known)) for name, path in known.items()}


def test_imports_run_downwards(graph: dict[str, set[str]]) -> None:
    found = [text for name, imported in graph.items() for other in imported if (text := problem(name, other))]
    assert not found, "\n".join(sorted(found))
    assert sum(map(len, graph.values())) > 100


def test_no_file_imports_itself_by_a_detour(graph: dict[str, set[str]]) -> None:
    left = {name: set(imported) for name, imported in graph.items()}
    while free := [name for name, imported in left.items() if not imported & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"a circle of imports among {sorted(left)}"


def without_device(text: str) -> list[str]:
    """The calls by which a text makes a tensor on the caller's default device."""
    makers = {function.__name__ for function in _device_constructors()}
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in makers) == ("torch", True)
        and not {"device", None} & {keyword.arg for keyword in node.keywords}
    ]


def test_tensors_are_made_on_a_device_that_the_code_names() -> None:
    found = {
        name: calls
        for name, path in files().items()
        if room(name) != "tools" and (calls := without_device(path.read_text()))
    }
    assert not found, f"the caller's default device may be another: {found}"


def test_the_checks_can_fail() -> None:
    assert without_device("torch.ones(2, dtype=d) + torch.zeros(2, device='cpu')") == ["torch.ones(2, dtype=d)"]
    known = {"bnfuse.api", "bnfuse.solve.search", "bnfuse.model.tree", "bnfuse.model"}
    lazy = "def f():\n    from bnfuse.api import fuse\n"
    assert imports(lazy, known) == {"bnfuse.api"}
    assert imports("from bnfuse.model import tree", known) == {"bnfuse.model.tree"}
    assert problem("bnfuse.solve.search", "bnfuse.api")
    assert problem("bnfuse.solve.search", "bnfuse.model.tree")
    assert problem("bnfuse.solve.search", "bnfuse.transaction")
    assert not problem("bnfuse.api", "bnfuse.solve.search")
