"""The pages: their examples run and print what stands there, and no reason and no operator goes without a word."""

from __future__ import annotations

import doctest
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfuse
from bnfuse import reasons
from bnfuse.rules import RULES
from bnfuse.tools import reference
from bnfuse.tools.zoo.randomise import randomise_

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DERIVATION = ROOT / "docs" / "how-it-works.md"

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Net(nn.Module):
    """A network for the code of README.md."""

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
    return {"__name__": "__main__"}


def text_of(page: Path) -> str:
    """The text of a page; what its examples share with those of another page stands before it."""
    text = page.read_text()
    if page.name == "removals.md":
        return DERIVATION.read_text().split("\n## One convolution and one norm\n")[0] + text
    return text


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
def test_examples(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # for the files that examples write
    """They print what stands there, and every network that is planned is fused and verified as well."""
    planned: list[tuple[nn.Module, Any, dict[str, Any]]] = []
    plan = bnfuse.plan

    def remembered(model: nn.Module, inputs: Any = None, **options: Any) -> bnfuse.Plan:
        planned.append((model, inputs, options))
        return plan(model, inputs, **options)

    monkeypatch.setattr(bnfuse, "plan", remembered)
    text = text_of(page)
    torch.manual_seed(0)
    found = failures(text, page.name, names_of(page))
    assert not found, found
    assert len(planned) >= text.count(">>> print(bnfuse.plan(") + text.count(">>> why(")
    for model, inputs, options in planned:
        bnfuse.fuse(model, inputs, **options)


def test_the_code_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It runs as it stands, with a model that somebody might have."""
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"model": randomise_(Net()).eval(), "x": torch.randn(2, 3, 8, 8), "build_model": Net}
    exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["served"](names["x"]), names["fused"](names["x"]))
    norms = [name for name, module in names["served"].named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ["norm2"]


def test_the_readme_is_one_page_and_shows_code_at_once() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 110
    assert "```python" in lines[:10]


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = [re.sub(".*<(.*)>", r"\1", page) for pages in site()["CONTENTS"].values() for page in pages]
    assert sorted(menu) == sorted({page.stem for page in PAGES} - {"README", "index"} | {"self"})


def test_links_to_what_is_no_page_become_names_on_the_site() -> None:
    linked = site()["linked"]
    assert linked("see [a rule](../src/bnfuse/rules)") == "see a rule (`src/bnfuse/rules`)"
    assert linked("see [`rules`](../src/bnfuse/rules), `[x](../src)`") == "see `rules`, `[x](../src)`"
    for text in ("[a](census.md#families)", "[a](../nowhere.py)", "[a](https://b.c)", "```\n[a](../src)\n```"):
        assert linked(text) == text


def site() -> dict[str, Any]:
    """What stands in the settings of the site."""
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def test_every_public_name_is_on_its_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^\.\. auto(?:function|class|exception):: bnfuse\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(bnfuse.__all__)


def test_a_wrong_example_is_found() -> None:
    assert not failures("```python\n>>> 1 + 1\n2\n```\n>>> 1 + 1\n3\n", "page", {})
    assert "Got:\n    2" in failures("```python\n>>> 1 + 1\n3\n```\n", "page", {})


# What is made from the source ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasons.md", "operators.md"])
def test_a_page_is_as_the_source_makes_it(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == reference.pages()[name], "run `python -m bnfuse.tools.reference docs`"


def test_every_operator_is_on_its_page() -> None:
    built_in = {name for name, rule in RULES.items() if rule.__module__.startswith("bnfuse.rules.")}
    page = reference.pages()["operators.md"]
    assert {name for name in built_in if f"`{name}`" not in page} == set()
    assert len(built_in) > 150


def test_every_rule_says_what_passes() -> None:
    silent = {rule.__qualname__ for rule in RULES.values() if not rule.__doc__ and "bnfuse" in rule.__module__}
    assert silent == set()


def test_every_cause_is_used_and_explained() -> None:
    constants = {name: cause for name, cause in vars(reasons).items() if isinstance(cause, reasons.Cause)}
    assert list(constants.values()) == list(reasons.CAUSES.values())
    assert len({cause.text for cause in constants.values()}) == len(constants)
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py") if path.name != "reasons.py")
    assert {name for name in constants if not re.search(rf"\b{name}\b", code)} == set()
    for cause in constants.values():
        assert min(map(len, (cause.code, cause.meaning, cause.advice, cause.group))) > 3, cause


def test_no_reason_is_written_twice() -> None:
    """A text of a reason stands in reasons.py alone."""
    texts = [cause.text for cause in reasons.CAUSES.values() if len(cause.text) > 20 and "{" not in cause.text]
    code = {path.name: path.read_text() for path in (ROOT / "src").rglob("*.py") if path.name != "reasons.py"}
    assert {(name, text) for name, source in code.items() for text in texts if f'"{text}"' in source} == set()


def _without_blocks(page: Path) -> str:
    return re.sub("^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _without_code(page: Path) -> str:
    return re.sub("`[^`]*`", "", _without_blocks(page))


def headings(page: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall("^#+ (.*)$", _without_blocks(page), re.MULTILINE)
    }


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", _without_code(page)):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or other.suffix != ".md" or anchor in headings(other), (
            f"{page.name} links to {target}#{anchor}"
        )
