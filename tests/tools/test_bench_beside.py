"""Other tools beside: what they leave is counted, and what they get wrong is seen."""

import copy
import json
import subprocess
from typing import Any

import pytest
import torch
from torch import nn

from bench import beside
from bench.beside import FAILS, RIGHT, WRONG, Finding, examined, report
from bench.other_tools import TOOLS, Case, Tool, judged
from bnfuse.tools.census.rivals import counted_run
from bnfuse.tools.zoo.randomise import randomise_


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)]
    model = randomise_(nn.Sequential(*layers)).eval().double()
    return Case.of(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))


def without(*names: str) -> Tool:
    """A tool that takes norms away and does nothing else."""

    def run(model: nn.Module, args: tuple[Any, ...]) -> tuple[int, Any]:
        for name in names:
            model.set_submodule(name, nn.Identity())
        return counted_run(model, args, False)

    return Tool("torch", run)


@pytest.mark.parametrize(
    ("name", "verdict", "left"),
    [
        ("bnfuse", RIGHT, 1),
        ("bnfuse, restructured", RIGHT, 0),
        ("torch.fx fuse", RIGHT, 1),
        ("pairs by declaration", RIGHT, 1),
    ],
)
def test_the_tools_that_come_with_torch(name: str, verdict: str, left: int, case: Case) -> None:
    before = copy.deepcopy(case.model.state_dict())
    found = judged(TOOLS[name], case)
    assert (found["verdict"], found["norms"], found["left"]) == (verdict, 2, left)
    assert all(torch.equal(before[key], tensor) for key, tensor in case.model.state_dict().items())


def test_a_wrong_tool_is_seen_and_all_norms_count_as_left(case: Case) -> None:
    assert judged(without(), case)["left"] == 2
    found = judged(without("1"), case)
    assert (found["verdict"], found["left"]) == (WRONG, 2)
    assert found["why"].startswith("relative L2 error")


def test_pairs_by_declaration_are_wrong_where_the_order_of_the_data_is_another() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.norm(torch.relu(self.conv(x))))
            return y

    case = Case.of(randomise_(Net()).eval().double(), (torch.randn(2, 3, 4, 4, dtype=torch.float64),))
    assert judged(TOOLS["pairs by declaration"], case)["verdict"] == WRONG
    assert (judged(TOOLS["bnfuse"], case)["verdict"], judged(TOOLS["bnfuse"], case)["left"]) == (RIGHT, 0)


def test_a_tool_that_raises(case: Case) -> None:
    def run(model: nn.Module, args: tuple[Any, ...]) -> tuple[int, Any]:
        raise RuntimeError("no\nreason")

    found = judged(Tool("torch", run), case)
    assert found == {"norms": 2, "left": 2, "verdict": FAILS, "why": "RuntimeError: no"}


def test_a_tool_that_ends_the_process_or_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"tool": "bnfuse", "norms": 3, "left": 1, "verdict": RIGHT})
    monkeypatch.setattr(beside, "TOOLS", {name: Tool("torch", without().run) for name in ("bnfuse", "other", "last")})

    def ended(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], -11, stdout=f"a word\n{line}\n".encode())

    def late(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired([], 1, output=line.encode())

    for run, why in ((ended, "ended the process"), (late, "took too long")):
        monkeypatch.setattr(subprocess, "run", run)
        assert examined("zoo:net", "net") == [
            Finding("zoo:net", "bnfuse", 3, 1, RIGHT),
            Finding("zoo:net", "other", 3, 3, FAILS, why),
            Finding("zoo:net", "last", 3, 3, FAILS, f"not tried: other {why}"),
        ]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=b""))
    assert examined("zoo:net", "net") == []


@pytest.mark.parametrize(("left", "met"), [(5, [True, True]), (6, [True, False])])
def test_the_table_and_the_targets(left: int, met: list[bool]) -> None:
    found = [
        Finding("zoo:a", "bnfuse", 10, left, RIGHT),
        Finding("zoo:a", "AIMET", 10, 5, RIGHT),
        Finding("zoo:b", "bnfuse", 1_000, 0, RIGHT),
        Finding("zoo:b", "AIMET", 1_000, 1_000, WRONG),
    ]
    section = report(found)
    assert [row[2:] for row in section.tables[0].rows] == [
        ("2", "2", "0", "0", "1,010", str(left)),
        ("2", "1", "1", "0", "1,010", "1,005"),
    ]
    assert [target.met for target in section.targets] == met
    assert not report([Finding("zoo:a", "bnfuse", 10, 10, WRONG)]).targets[0].met
