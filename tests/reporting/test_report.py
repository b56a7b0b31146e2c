"""The verb and the command line: one file is written, from one planning, or it is said why not before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import EXAMPLES, quickly
from support import assert_untouched, snapshot
from torch import nn

import bnfuse
from bnfuse.errors import InputError
from bnfuse.planner.problem import Problem
from bnfuse.reasons import CALLER_KEEPS
from bnfuse.reporting import report as verb
from bnfuse.tools.cli import main
from bnfuse.tools.zoo.randomise import randomise_

NETWORK = """
import torch
from torch import nn
from bnfuse.tools.zoo import randomise_

def net():
    torch.manual_seed(0)
    return randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid()))
"""


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was drawn."""
    quickly(monkeypatch)
    drawn: list[dict[str, Any]] = []
    draw = verb.page

    def page(found: dict[str, Any]) -> str:
        drawn.append(found)
        return draw(found)

    monkeypatch.setattr(verb, "page", page)
    return drawn


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "networks.py"
    path.write_text(NETWORK)
    return f"{path}:net"


def test_a_file_is_written(tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    example = EXAMPLES["stream"]
    model = example.model(torch.float32).train()
    before, state = snapshot(model), torch.get_rng_state()
    target = bnfuse.report(model, example.given(torch.float32), tmp_path / "a page.html")
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert target == tmp_path / "a page.html"
    assert target.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    [found] = facts
    difference = found["summary"]["difference"]
    assert 0 < difference["relative"] < 10 * difference["rounding"] < 1e-5
    assert difference["equal"]
    assert difference["text"].endswith("equal within tolerance")
    assert found["kind"] == "fuse"


def test_a_plan_alone(tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    example = EXAMPLES["stream"]
    path = tmp_path / "plan.htm"
    path.write_text("old")
    assert bnfuse.report(example.model(), example.given(), str(path), apply=False, measure=False) == path
    assert "old" not in path.read_text(encoding="utf-8")[:3]
    [found] = facts
    assert found["kind"] == "plan"
    assert found["summary"]["difference"] is None
    assert found["errors"] == found["ranges"] == []


def test_options_arrive(tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    example = EXAMPLES["stream"]
    bnfuse.report(example.model(), example.given(), tmp_path / "x.html", keep="b", measure=False)
    assert [decision["removed"] for decision in facts[0]["decisions"]] == [True, False, False]
    assert facts[0]["decisions"][1]["reason"]["code"] == CALLER_KEEPS.code


def test_a_program(tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 5, 5),))
    bnfuse.report(program, path=tmp_path / "x.html")
    assert (facts[0]["summary"]["norms"], facts[0]["summary"]["removed"]) == (1, 1)
    assert facts[0]["errors"]


class NeverRun(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it was run")


def test_a_bad_path_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    cases = {
        "nowhere/x.html": "there is no folder",
        "folder.html": "that is a folder",
        "x.txt": "write a name that ends in .html",
        "x": "write a name that ends in .html",
    }
    for name, text in cases.items():
        with pytest.raises(InputError, match=text):
            bnfuse.report(NeverRun(), torch.ones(1), tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission"):
        bnfuse.report(NeverRun(), torch.ones(1), tmp_path / "x.html")
    tmp_path.chmod(0o700)


def test_fuse_and_plan_on_the_command_line(
    spec: str, tmp_path: Path, facts: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    recorded = []
    of = Problem.of
    monkeypatch.setattr(Problem, "of", lambda *args, **options: recorded.append(1) or of(*args, **options))
    for command, kind in (("fuse", "fuse"), ("plan", "plan")):
        path = tmp_path / f"{command}.html"
        assert main([command, spec, "--input", "1x3x8x8", "--report", str(path)]) == 0
        assert path.is_file()
        assert f"wrote {path}" in capsys.readouterr().out
        assert (facts[-1]["kind"], facts[-1]["spec"]) == (kind, spec)
    assert len(recorded) == 2  # neither is planned twice


def test_json_and_report(spec: str, tmp_path: Path, facts: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, weights = tmp_path / "x.html", tmp_path / "x.pt"
    arguments = ["--input", "1x3x8x8", "--report", str(path), "--json"]
    assert main(["fuse", spec, *arguments, "-o", str(weights)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(path)
    assert printed["plan"]["fused"] == facts[0]["summary"]["removed"] == 1
    file = next(row for row in facts[0]["summary"]["rows"] if row["name"] == "file")
    assert (file["before"], file["after"]) == (None, weights.stat().st_size)
    assert facts[0]["summary"]["difference"]["relative"] == printed["comparison"]["outputs"][0]["relative_l2"]
    assert main(["plan", spec, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(path)


@pytest.mark.parametrize("command", ["fuse", "plan"])
def test_a_bad_path_on_the_command_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "x.html"
    assert main([command, "no.such.module:factory", "--report", str(path)]) == 2
    assert "there is no folder" in capsys.readouterr().err
