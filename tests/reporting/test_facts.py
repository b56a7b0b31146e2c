"""The facts of a report: a picture that fits the run, counts that fit the plan, reasons that know their operator."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from networks import EXAMPLES, Example, conv, fused_facts, images, norm, planned_facts, quickly
from rule_cases import Net
from support import assert_untouched, snapshot
from torch import Tensor, nn

import bnfuse
from bnfuse.api import fuse_with_plan
from bnfuse.capture.run import Recording
from bnfuse.model.calls import Call
from bnfuse.printing.sizes import Holding
from bnfuse.reporting import facts
from bnfuse.reporting.cost import multiply_adds
from bnfuse.reporting.dataflow import is_layer
from bnfuse.reporting.page import page
from bnfuse.rules import RULES
from bnfuse.tools.zoo.randomise import randomise_

KINDS = {"input", "output", "layer", "norm", "operator", "constant"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def rows(found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {row["name"]: (row["before"], row["after"]) for row in found["summary"]["rows"]}


def ran(model: nn.Module, inputs: Any) -> list[Any]:
    """The operators of a model that depend on its inputs."""
    run = Recording(model, RULES).record(Call.of(inputs))[0]
    return [node for node in run.nodes if not all(value.independent for value in node.outputs)]


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_the_picture_holds_together(example: Example) -> None:
    model = example.model()
    before = snapshot(model)
    found, _, plan = fused_facts(model, example.given())
    assert_untouched(model, before)
    json.dumps(found, allow_nan=False)
    graph, decisions = found["graph"], found["decisions"]
    nodes = graph["nodes"]
    assert [node["id"] for node in nodes] == list(range(len(nodes)))
    assert {node["kind"] for node in nodes} <= KINDS
    modules = {entry["name"]: entry for entry in graph["modules"]}
    names = dict(model.named_modules())
    for node in nodes:
        assert node["class"] == type(names[node["module"]]).__name__ == modules[node["module"]]["class"]
    for entry in modules.values():
        assert entry["parent"] in modules if entry["name"] else entry["parent"] is None
    for start, end, _ in graph["edges"]:
        assert 0 <= start < end < len(nodes)
    reached = {end for _, end, _ in graph["edges"]}
    assert all(node["id"] in reached for node in nodes if node["kind"] in ("norm", "output"))
    for norm_nodes, place in ((decision["norm_nodes"], place) for place, decision in enumerate(decisions)):
        assert all(nodes[step]["decision"] == place for step in norm_nodes)
        assert all(nodes[step]["kind"] == "norm" for step in norm_nodes)
    assert found["summary"]["norms"] == len(plan.decisions) == len(decisions)
    assert found["summary"]["removed"] == len(plan.fused) == sum(decision["removed"] for decision in decisions)
    edges = {(start, end) for start, end, _ in graph["edges"]}
    for entry, decision in zip(decisions, plan.decisions, strict=True):
        assert (entry["norm"], entry["removed"], entry["into"]) == (decision.norm, decision.fused, list(decision.into))
        assert {tuple(edge) for edge in entry["path"]} <= edges
        assert bool(entry["path"]) == bool(entry["into_nodes"]) == decision.fused
        assert {nodes[step]["module"] for step in entry["into_nodes"]} <= {name.split(".")[0] for name in entry["into"]}
        assert (entry["reason"] is None) == decision.fused


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_what_is_not_removed_is_what_the_fused_model_runs(example: Example) -> None:
    model, inputs = example.model(), example.given()
    found, fused, _ = fused_facts(model, inputs)
    nodes = found["graph"]["nodes"]
    kept = [n for n in nodes if n["kind"] not in ("input", "output", "constant") and not n["removed"]]
    run = ran(fused, inputs)
    assert [node["operator"] for node in kept] == [node.operator for node in run]
    held = dict(model.named_parameters())
    for box, node in zip(kept, run, strict=True):
        if not is_layer(node):
            continue
        names = {value.names[0] for value in node.inputs if value.names and isinstance(value.tensor, nn.Parameter)}
        assert set(box["created"]) == {name for name in names if name not in held}
        same = all(torch.equal(held[name], fused.get_parameter(name)) for name in names if name in held)
        assert box["changed"] == (not same or bool(box["created"])) or "parametrizations" in str(names)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_what_a_plan_foretells_comes_true(example: Example) -> None:
    model, inputs = example.model(), example.given()
    planned, _ = planned_facts(model, inputs)
    found, fused, plan = fused_facts(model, inputs)
    assert (planned["kind"], found["kind"]) == ("plan", "fuse")
    actual = rows(found)
    latency = actual.pop("latency")
    assert min(latency) > 0
    assert rows(planned) == actual
    for name in ("graph", "decisions"):
        assert planned[name] == found[name]
    before, after = Holding.of(model, len(plan.decisions)), Holding.of(fused, len(plan.kept))
    assert actual["parameters"] == (before.parameters, after.parameters)
    assert actual["buffers"] == (before.buffers, after.buffers)
    assert actual["parameters and buffers"] == (before.size, after.size)
    run = ran(fused, inputs)
    counted = multiply_adds(run, [node for node in run if node.operator == "batch_norm"])
    assert actual["multiply-adds"][1] == counted  # not compared in place: pytest would print the whole graph


def test_a_removed_norm_is_read_past_by_its_first_edge() -> None:
    example = EXAMPLES["frozen"]
    found, _, _ = fused_facts(example.model(), example.given())
    nodes = found["graph"]["nodes"]
    removed = [node["id"] for node in nodes if node["removed"]]
    assert {nodes[place]["kind"] for place in removed} == {"norm", "constant"}
    for place in removed:
        first = [start for start, end, _ in found["graph"]["edges"] if end == place][:1]
        if nodes[place]["kind"] == "norm":
            assert nodes[first[0]]["module"] == "u" or first[0] in removed
            assert nodes[first[0]]["kind"] != "constant"


def test_the_way_leads_from_the_norm_to_its_layers() -> None:
    example = EXAMPLES["concatenation"]
    found, _, _ = fused_facts(example.model(), example.given())
    places = {node["module"] or node["operator"]: node["id"] for node in found["graph"]["nodes"]}
    [decision] = found["decisions"]
    ways = {(places["u"], places["cat"]), (places["v"], places["cat"]), (places["cat"], places["n"])}
    assert {tuple(edge) for edge in decision["path"]} == ways
    assert decision["into_nodes"] == [places["u"], places["v"]]


def test_the_operator_that_refused_is_the_right_one_of_two() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.n(m.u(x.relu()).relu()).sin().relu()

    model = randomise_(Net(forward, u=conv(), n=norm())).eval()
    found, plan = planned_facts(model, images())
    reason = found["decisions"][0]["reason"]
    relus = [node["id"] for node in found["graph"]["nodes"] if node["operator"] == "relu"]
    sines = [node["id"] for node in found["graph"]["nodes"] if node["operator"] == "sin"]
    assert reason["refused_by"] == [relus[1], sines[0]]
    assert reason["code"] == "no-negative-scale"
    assert reason["text"] == "relu in Net: no negative scale passes through it"
    assert reason["details"] == [str(one) for one in plan.kept[0].reasons]
    assert reason["meaning"]
    assert reason["advice"]
    assert "step" not in plan.to_dict()["decisions"][0]["reasons"][0]


def test_what_refused_in_another_call_is_shown_in_the_first() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.n = conv(), norm()

        def forward(self, x: Tensor, inside: bool = False) -> Tensor:
            x = self.n(self.u(x))
            return x.sin() if inside else x

        def inner(self, x: Tensor) -> Tensor:
            return self.u(x + 1)

    found, _ = planned_facts(randomise_(Two()).eval(), images(), calls=[Call(images(), method="inner")])
    [decision] = found["decisions"]
    assert not decision["removed"]
    operators = [found["graph"]["nodes"][place]["operator"] for place in decision["reason"]["refused_by"]]
    assert operators == ["conv2d", "batch_norm"]
    assert "inner(float32 2x3x6x5)" in found["calls"]


def test_words_about_the_calls() -> None:
    example = EXAMPLES["named input"]
    found, _, _ = fused_facts(example.model(torch.float32), example.given(torch.float32))
    assert found["inputs"] == ["x: float32 2x3x6x5", "mask: float32 2x1x6x5"]
    assert found["calls"][0] == "forward(x=float32 2x3x6x5, mask=float32 2x1x6x5)"
    assert found["model"] == "Masked"
    assert found["summary"]["assumed"][0].startswith("the model runs in evaluation mode")
    assert found["summary"]["warning"] is None
    nothing, _, _ = fused_facts(EXAMPLES["nothing goes"].model(), EXAMPLES["nothing goes"].given())
    assert nothing["summary"]["warning"].startswith("No batch norm of Net was fused")


def test_work_out_of_place_is_assumed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.u(x)
        return m.v(m.act(m.n(y))) + y.mean()

    layers = {"u": conv(), "v": conv(4), "act": nn.SiLU(inplace=True)}
    model = Net(forward, **layers, n=randomise_(norm(), dead=0.0)).eval()
    found, plan = planned_facts(model, images())
    assert plan.out_of_place in ((), ("act",))
    assert any("act" in text for text in found["summary"]["assumed"]) == (plan.out_of_place == ("act",))


def test_inputs_are_inferred() -> None:
    model = randomise_(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))).eval()
    found, _, _ = fused_facts(model, None)
    assert found["summary"]["removed"] == 1
    assert found["inputs"] == ["float32 2x7"]
    assert len(found["errors"]) == 1


class NormWithActivation(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_norm_with_an_activation_keeps_it() -> None:
    model = randomise_(nn.Sequential(conv(), NormWithActivation(4), conv(4))).eval()
    found, fused, _ = fused_facts(model, images())
    assert found["summary"]["removed"] == 1
    shown = [node["operator"] for node in found["graph"]["nodes"] if not node["removed"]]
    assert shown == ["input", *(node.operator for node in ran(fused, images())), "output"]
    assert "silu" in shown


def test_without_measuring_nothing_is_run_again() -> None:
    runs = []

    def forward(m: Any, x: Tensor) -> Tensor:
        runs.append(type(x))
        return m.n(m.u(x))

    model = randomise_(Net(forward, u=conv(), n=norm())).eval()
    counts = []
    for measure in (False, True):
        observer = facts.Facts(measure=measure)
        runs.clear()
        fuse_with_plan(model, images(), observer=observer)
        counts.append(len(runs))
        found = observer.finished()
        assert bool(found["errors"]) == bool(found["ranges"]) == ("latency" in rows(found)) == measure
    runs.clear()
    bnfuse.fuse(model, images())
    assert counts[0] == len(runs) < counts[1]


def test_latency_has_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES["named input"]
    monkeypatch.setattr(facts, "SECONDS", 5.0)  # far more than fifty rounds take
    found, _, _ = fused_facts(example.model(), example.given())
    [row] = [row for row in found["summary"]["rows"] if row["name"] == "latency"]
    for when in ("before", "after"):
        low, high = row["quartiles"][when]
        assert 0 < low <= row[when] <= high
    monkeypatch.setattr(facts, "SECONDS", 0.0)
    found, _, _ = fused_facts(example.model(), example.given())
    assert found["summary"]["rows"][-1]["quartiles"] == {"before": None, "after": None}


def test_a_model_that_remembers_is_not_timed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.n = conv(), norm()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.n(self.u(x))

    model = randomise_(Counting()).eval()
    found, _, _ = fused_facts(model, images())
    assert "latency" not in rows(found)
    assert float(model.calls) == 0


HOSTILE = [
    "<script>document.title='ran'</script>",
    "\"quotes' `and` ${dollars} \\",
    "\u202eright to left \u05d0\u05d1",
    "a" * 200,
    "</script><img src=x onerror=alert(1)>",
    "constructor",
    "__proto__",
]


def test_hostile_names_stay_text() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x

    kind = type("Net<b>&amp;", (nn.Module,), {"forward": forward})
    odd = type("</script>Odd", (nn.Module,), {"forward": lambda self, x: x.sin()})
    model = kind()
    layers = [conv(), norm(), odd(), norm(), nn.ReLU(), norm(), nn.Tanh()]
    for name, layer in zip(HOSTILE, layers, strict=True):
        model._modules[name] = layer
    found, _, _ = fused_facts(randomise_(model).eval(), images())
    again = json.loads(json.dumps(found))
    assert again == found
    assert {entry["name"] for entry in found["graph"]["modules"]} >= set(HOSTILE)
    assert [decision["norm"] for decision in found["decisions"]] == [HOSTILE[1], HOSTILE[3], HOSTILE[5]]
    text = page(found)
    assert "<script>document" not in text
    assert "<img" not in text


def test_multiply_adds() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 2, 2), nn.Flatten(), nn.Linear(50, 7)
    ).eval()  # fmt: skip
    run = Recording(model, RULES).record(Call(torch.randn(3, 4, 6, 6)))[0]
    norms = [node for node in run.nodes if node.operator == "batch_norm"]
    parts = [3 * 6 * 16 * 2 * 9, 3 * 6 * 16, 3 * 6 * 16 * 2 * 4, 3 * 7 * 50]
    assert multiply_adds(run.nodes, norms) == sum(parts)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x @ x.transpose(1, 2), 2 * 6 * 6 * 5),
        (lambda m, x: torch.bmm(x, x.transpose(1, 2)), 2 * 6 * 6 * 5),
        (lambda m, x: torch.einsum("bij,bkj->bik", x, x), 2 * 6 * 6 * 5),
        (lambda m, x: nn.functional.scaled_dot_product_attention(x, x, x), 2 * 6 * 6 * (5 + 5)),
        (lambda m, x: m.l(x)[0], 2 * 6 * (4 * 3 * 5 + 4 * 3 * 3)),
        (lambda m, x: x.relu() + x, 0),
    ],
)
def test_multiply_adds_of_products(function: Any, expected: int) -> None:
    model = Net(function, l=nn.LSTM(5, 3, batch_first=True)).eval()
    run = Recording(model, RULES).record(Call(torch.randn(2, 6, 5)))[0]
    assert multiply_adds(run.nodes, ()) == expected
