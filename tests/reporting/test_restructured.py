"""Reports of models whose structure changed: both pictures, steps, and numbers of the layers that have a counterpart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import conv, fused_facts, images, norm, planned_facts, quickly
from rule_cases import Net
from support import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bnfuse
from bnfuse.capture.run import Recording
from bnfuse.model.calls import Call
from bnfuse.printing.sizes import Holding
from bnfuse.reporting import drawn, facts
from bnfuse.reporting.cost import multiply_adds
from bnfuse.reporting.dataflow import is_layer
from bnfuse.rules import RULES
from bnfuse.tools.cli import main
from bnfuse.tools.zoo.randomise import randomise_

EXACT = 1e-12


class Block(nn.Module):
    """Parallel branches, as networks have them that are made to be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = conv(4, 4, 3, padding=1, bias=False), norm()
        self.b, self.nb = conv(4, 4, bias=False), norm()
        self.n, self.act = norm(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.na(self.a(x)) + self.nb(self.b(x)) + self.n(x))


class Heads(nn.Module):
    """A layer that is shared by three heads with norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(norm() for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one(self.conv(y)).relu() for one, y in zip(self.norms, (x, x[..., ::2], x[..., ::4]), strict=True)]


def _baked() -> nn.Module:
    return Net(lambda m, x: m.last(m.n(m.u(x)).sin()), u=weight_norm(conv()), last=conv(4), n=norm())


def _untied() -> nn.Module:
    return Net(lambda m, x: m.heads(m.n(m.u(x))), u=conv(), n=norm(), heads=Heads())


def _merged() -> nn.Module:
    return nn.Sequential(conv(), norm(), nn.ReLU(), Block(), conv(4), nn.Sigmoid(), norm(), nn.Tanh())


def _in_code() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).sin()
        x = m.na(m.a(x)) + m.nb(m.b(x))
        return m.last(x.sin())

    layers = {"first": conv(), "a": conv(4, 4, 3, padding=1), "b": conv(4), "last": conv(4)}
    return Net(forward, **layers, na=norm(), nb=norm())


def _all() -> nn.Module:
    return nn.Sequential(weight_norm(conv()), norm(), nn.ReLU(), Block(), nn.Sequential(conv(4), norm(), Heads()))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, list[str], list[str], int]] = {
    "bake": (_baked, "bake", ["bake"], ["u", "last"], 0),
    "untie": (_untied, "untie", ["untie"], ["u", *3 * ["heads.conv"]], 0),
    "merge": (_merged, "merge", ["merge"], ["0", "4", "6"], 2),
    "merge in code": (_in_code, "merge", ["merge"], ["first", "last"], 2),
    "all": (_all, True, ["bake", "untie", "merge"], ["0", "4.0", *3 * ["4.2.conv"]], 2),
    "nothing to do": (_baked, "untie", [], ["u", "last"], 0),
}
"""Network, what is asked for, the steps, the layers that can be compared, and how many cannot."""

given = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(CASES[name][0]().to(dtype), dead=0.2).eval()


def ran(model: nn.Module, x: Tensor) -> list[Any]:
    return [node for node in Recording(model, RULES).record(Call(x))[0].nodes if not node.outputs[0].independent]


@given
def test_both_pictures_are_those_of_the_runs(name: str) -> None:
    model, x = made(name), images().double()
    before = snapshot(model)
    found, fused, plan = fused_facts(model, x, restructure=CASES[name][1])
    assert_untouched(model, before)
    json.dumps(found, allow_nan=False)
    assert [step["kind"] for step in found["steps"]] == CASES[name][2]
    assert [step["parameters"] for step in found["steps"]] == [step.parameters for step in plan.steps]
    assert len(found["unchanged"]) == len(plan.unchanged)
    graphs = [found["graph"], found["graph_after"] or found["graph"]]
    assert (found["graph_after"] is None) == (not plan.steps)
    for graph, run, after in zip(graphs, (ran(model, x), ran(fused, x)), (False, True), strict=True):
        nodes = [n for n in graph["nodes"] if n["kind"] not in ("input", "output", "constant")]
        nodes = [n for n in nodes if not (after and n["removed"])]
        assert [n["operator"] for n in nodes] == [node.operator for node in run]
        assert all(0 <= start < end < len(graph["nodes"]) for start, end, _ in graph["edges"])
        if after:
            held, old = dict(fused.named_parameters()), dict(model.named_parameters())
            for box, node in zip(nodes, run, strict=True):
                names = {value.names[0] for value in node.inputs if value.names} & held.keys()
                same = all(key in old and torch.equal(old[key], held[key]) for key in names)
                assert box["changed"] or same or not is_layer(node)
                assert {*box["parameters"], *box["created"]} >= names
    for node in (found["graph_after"] or {"nodes": []})["nodes"]:
        twin = None if node["before"] is None else graphs[0]["nodes"][node["before"]]
        assert twin is None or (twin["operator"], twin["shape"]) == (node["operator"], node["shape"])


@given
def test_every_norm_is_found_where_it_went(name: str) -> None:
    found, _, plan = fused_facts(made(name), images().double(), restructure=CASES[name][1])
    before, after = found["graph"]["nodes"], (found["graph_after"] or found["graph"])["nodes"]
    edges = {(start, end) for start, end, _ in found["graph"]["edges"]}
    assert len(found["decisions"]) == len(plan.decisions) == found["summary"]["norms"]
    for place, (entry, decision) in enumerate(zip(found["decisions"], plan.decisions, strict=True)):
        assert (entry["norm"], entry["removed"]) == (decision.norm, decision.fused)
        assert [before[box]["module"] for box in entry["norm_nodes"]] == [decision.norm]
        assert all(before[box]["decision"] == place for box in entry["norm_nodes"])
        assert {tuple(edge) for edge in entry["path"]} <= edges
        if not decision.fused:
            assert not entry["into_nodes"]
            assert [before[box]["operator"] for box in entry["reason"]["refused_by"]]
            continue
        boxes = entry["after"]["into_nodes"] if entry["after"] else entry["into_nodes"]
        assert boxes
        assert all(after[box]["kind"] == "layer" and after[box]["changed"] for box in boxes)
        if entry["step"] is None:
            assert {after[box]["module"] for box in boxes} <= set(decision.into)
            assert len(entry["into_nodes"]) == len(boxes)
        else:
            assert found["steps"][entry["step"]]["kind"] == decision.direction == "merge"


@given
def test_numbers_are_those_of_both_models(name: str) -> None:
    model, x = made(name), images().double()
    found, fused, plan = fused_facts(model, x, restructure=CASES[name][1])
    rows = {row["name"]: (row["before"], row["after"]) for row in found["summary"]["rows"]}
    holding, other = Holding.of(model, len(plan.decisions)), Holding.of(fused, len(plan.kept))
    assert rows["parameters"] == (holding.parameters, other.parameters)
    assert rows["buffers"] == (holding.buffers, other.buffers)
    assert rows["parameters and buffers"] == (holding.size, other.size)
    counted = []
    for run in (ran(model, x), ran(fused, x)):
        counted.append(multiply_adds(run, {node for node in run if node.operator == "batch_norm"}))
    assert rows["multiply-adds"] == tuple(counted)
    assert counted[1] < counted[0]
    assert min(rows["latency"]) > 0


@given
def test_a_plan_foretells_the_pictures_and_the_numbers(name: str) -> None:
    planned, _ = planned_facts(made(name), images().double(), restructure=CASES[name][1])
    found, _, _ = fused_facts(made(name), images().double(), restructure=CASES[name][1])
    for part in ("graph", "graph_after", "decisions", "steps", "unchanged"):
        assert planned[part] == found[part]
    assert planned["summary"]["rows"] == [row for row in found["summary"]["rows"] if row["name"] != "latency"]
    assert (planned["errors"], planned["left_out"]) == ([], 0)
    assert len(planned["ranges"]) == len(CASES[name][3]) + CASES[name][4]


@given
def test_layers_with_a_counterpart_agree_in_float64(name: str) -> None:
    found, _, _ = fused_facts(made(name), images().double(), restructure=CASES[name][1])
    *_, compared, left_out = CASES[name]
    assert [error["module"] for error in found["errors"]] == compared
    assert max(error["relative"] for error in found["errors"]) < EXACT
    assert found["left_out"] == left_out
    nodes = found["graph"]["nodes"]
    assert all(nodes[error["node"]]["module"] == error["module"] for error in found["errors"])
    for entry in found["ranges"]:
        assert entry["activation"]["before"] is not None
        assert entry["activation"]["after"] is not None


@given
def test_float32_differs_by_its_rounding(name: str) -> None:
    found, _, _ = fused_facts(made(name, torch.float32), images(), restructure=CASES[name][1])
    for error in found["errors"]:
        assert 0 <= error["relative"] <= 8 * max(error["rounding"], torch.finfo(torch.float32).eps / 4)


@pytest.mark.parametrize(
    ("owner", "attribute", "missing"),
    [
        (drawn, "counterparts", "graph_after"),
        (drawn.Drawn, "graph_after", "graph_after"),
        (drawn.Drawn, "measured", "errors"),
        (facts, "Drawn", "graph"),
        (drawn.Planner, "solution", "errors"),
        (drawn.Drawn, "multiply_adds", ""),
    ],
)
def test_what_fails_is_left_out(owner: Any, attribute: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(owner, attribute, fail)
    model, x = made("all"), images().double()
    found, fused, _ = fused_facts(model, x, restructure=True)
    assert not found.get(missing)
    assert len(found["steps"]) == 3
    for one, other in zip(fused(x), model(x), strict=True):
        assert torch.allclose(one, other, rtol=EXACT, atol=EXACT)


def test_the_verb_restructures(tmp_path: Path) -> None:
    for apply in (True, False):
        path = bnfuse.report(
            made("merge"), images().double(), tmp_path / "out.html", restructure="merge", apply=apply, measure=False
        )
        assert '"graph_after":{"nodes"' in path.read_text(encoding="utf-8")
    with pytest.raises(bnfuse.InputError, match="restructure"):
        bnfuse.report(made("merge"), images().double(), tmp_path / "out.html", restructure="melt")


NETWORK = """
import torch
from torch import nn
from bnfuse.tools.zoo import randomise_

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na, self.b, self.nb = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.na(self.a(x)) + self.nb(self.b(x))

def net():
    torch.manual_seed(0)
    return randomise_(nn.Sequential(Block(), nn.ReLU()))
"""


@pytest.mark.parametrize("command", ["fuse", "plan"])
def test_the_command_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "networks.py").write_text(NETWORK)
    spec, path = f"{tmp_path / 'networks.py'}:net", tmp_path / "out.html"
    arguments = [command, spec, "--input", "1x3x4x4", "--restructure", "merge", "--report", str(path)]
    assert main(arguments) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert '"graph_after":{"nodes"' in path.read_text(encoding="utf-8")
