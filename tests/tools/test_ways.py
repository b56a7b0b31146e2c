"""The table of ways: every way ends with the outputs of the original, and one that does not is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bnfuse.tools import ways

SPEC = "timm:resnet10t"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> ways.Case:
    return ways.case_of(SPEC, tmp_path_factory.mktemp("ways"))


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way(name: str, case: ways.Case) -> None:
    assert ways.error(case, ways.WAYS[name]) < 1e-9


def test_a_wrong_way_is_seen(case: ways.Case) -> None:
    def wrong(case: ways.Case) -> ways.Runnable:
        fresh = case.build().double().eval()
        fresh.load_state_dict(case.fused.state_dict(), strict=False)
        return fresh

    assert ways.error(case, wrong) > 0.1


def test_the_page_gets_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: ways.Case) -> ways.Runnable:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(ways, "WAYS", {"one": lambda case: case.fused, "other": fails})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ways._BEGIN}\nold\n{ways._END}\nafter\n")
    assert ways.main(["--page", str(page), "--network", SPEC]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "one" in text
    assert "RuntimeError: no such thing" in text


def test_another_shape_is_an_infinite_error() -> None:
    case = ways.Case(nn.Identity, nn.Identity(), nn.Identity(), torch.ones(1), Path())
    assert ways.error(case, lambda _: lambda x: torch.ones(2)) == float("inf")
