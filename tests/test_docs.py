"""The pages: their examples run and print what stands there, and no reason and no operator goes without a word."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfuse
from bnfuse.rules import RULES
from bnfuse.tools.zoo.randomise import randomise_

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DERIVATION = ROOT / "docs" / "how-it-works.md"

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Net(nn.Module):
    """The network of the example in README.md."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.norm2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 1)
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(F.relu(self.norm1(self.conv1(x))))
        return self.norm3(self.head(F.relu(self.conv2(x))))


def names_of(page: Path) -> dict[str, Any]:
    """What the examples of a page take for given."""
    if page.name == "README.md":
        return {"__name__": "__main__", "bnfuse": bnfuse, "model": randomise_(Net()).eval()}
    return {"__name__": "__main__"}


def examples(text: str, name: str, names: dict[str, Any]) -> doctest.DocTest:
    """The fenced blocks of a page, the rest blank, so that line numbers hold and no fence counts as output."""
    inside = False
    lines = []
    for line in text.splitlines():
        fence = line.startswith("```")
        inside ^= fence
        lines.append(line if inside and not fence else "")
    return doctest.DocTestParser().get_doctest("\n".join(lines) + "\n", names, name, name, 0)


def failures(text: str, name: str, names: dict[str, Any]) -> str:
    """What is wrong with the examples, empty if nothing is."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    runner.run(examples(text, name, names), out=report.append, clear_globs=False)
    return "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They print what stands there, and every network that is planned is fused and verified as well."""
    planned: list[tuple[nn.Module, Any, dict[str, Any]]] = []
    plan = bnfuse.plan

    def remembered(model: nn.Module, inputs: Any = None, **options: Any) -> bnfuse.Plan:
        planned.append((model, inputs, options))
        return plan(model, inputs, **options)

    monkeypatch.setattr(bnfuse, "plan", remembered)
    text = page.read_text()
    torch.manual_seed(0)
    found = failures(text, page.name, names_of(page))
    assert not found, found
    assert len(planned) >= text.count(">>> print(bnfuse.plan(") + text.count(">>> why(")
    for model, inputs, options in planned:
        bnfuse.fuse(model, inputs, **options)


def test_a_wrong_example_is_found() -> None:
    assert not failures("```python\n>>> 1 + 1\n2\n```\n>>> 1 + 1\n3\n", "page", {})
    assert "Got:\n    2" in failures("```python\n>>> 1 + 1\n3\n```\n", "page", {})


# Reasons ------------------------------------------------------------------------------------------------------------

REASONED = {"refuse", "Reason", "pin", "_pin_all", "expose", "_refuse_value", "fixed"}
"""Calls whose arguments are words of a reason."""


def parts_of_reasons(source: str) -> set[str]:
    """What the reasons in a source file say: the constant parts of every text, without single words."""
    found: set[str] = set()
    for definition in _outermost_functions(ast.parse(source)):
        assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(definition):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        assigned.setdefault(target.id, []).append(node.value)
        for node in ast.walk(definition):
            if isinstance(node, ast.Call) and _name(node.func) in REASONED:
                for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                    found |= set(_words(argument, assigned, set()))
    return {part for part in found if " " in part}


def _outermost_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child
        else:
            yield from _outermost_functions(child)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _words(expression: ast.expr, assigned: dict[str, list[ast.expr]], seen: set[str]) -> Iterator[str]:
    for node in ast.walk(expression):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _plain(node.value)
        elif isinstance(node, ast.Name) and node.id not in seen:
            for value in assigned.get(node.id, ()):
                yield from _words(value, assigned, seen | {node.id})


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" ,:")


def section(title: str) -> str:
    return DERIVATION.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(title: str) -> list[str]:
    """The code in the first column of the tables of a section, but for the headings."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [code for row in rows for code in re.findall("`([^`]*)`", row.split(" | ")[0])]


@pytest.fixture(scope="module")
def given() -> set[str]:
    return {part for path in (ROOT / "src").rglob("*.py") for part in parts_of_reasons(path.read_text())}


@pytest.fixture(scope="module")
def explained() -> list[str]:
    return [_plain(part) for message in first_column("Reading a reason") for part in message.split("…")]


def test_every_reason_is_explained(given: set[str], explained: list[str]) -> None:
    missing = sorted(part for part in given if not any(part in message for message in explained))
    assert not missing, f"not in the table 'Reading a reason' of {DERIVATION.name}: {missing}"
    assert len(given) > 80


def test_every_explained_reason_can_be_given(given: set[str], explained: list[str]) -> None:
    gone = sorted(message for message in explained if message and not any(message in part for part in given))
    assert not gone, f"in the table 'Reading a reason' of {DERIVATION.name}, but no longer in the source: {gone}"


def test_parts_of_reasons() -> None:
    source = """
class Rule:
    def method(self, trial, node, value):
        what = "it is a tensor" if value else "it is a number"
        text = f"no {node} passes: {what or 'nothing at all'}"
        trial.refuse(node, text, scale=True)
        raise ValueError("not a reason")
"""
    assert parts_of_reasons(source) == {"it is a tensor", "it is a number", "nothing at all"}
    assert parts_of_reasons('def f():\n    Reason(f"the {x} of an {y} stays put")') == {"of an", "stays put"}


def test_every_operator_is_in_the_table() -> None:
    named = {code for code in first_column("The operators") if len(code) > 1}
    named |= {code for code in first_column("The operators") if code in RULES}
    rules = {name for name in RULES if not name.startswith("example::")}  # which another page registers
    assert named == rules, f"missing: {sorted(rules - named)}, gone: {sorted(named - rules)}"


def test_links_within_the_page() -> None:
    text = re.sub("^```.*?^```", "", DERIVATION.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall("^#+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings
