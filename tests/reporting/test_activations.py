"""Activations of both models on the same input: exact once the units are undone, and wrong where something is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import EXAMPLES, Example, conv, fused_facts, images, norm, planned_facts, quickly
from rule_cases import Net
from torch import nn

from bnfuse.api import fuse_with_plan
from bnfuse.reporting import activations
from bnfuse.reporting.activations import Sample, numbers, relative_error, undone
from bnfuse.reporting.facts import Facts
from bnfuse.units import Unit

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_every_layer_agrees_in_float64(example: Example) -> None:
    found, _, plan = fused_facts(example.model(), example.given())
    assert tuple(decision.direction for decision in plan.decisions) == example.directions
    assert [error["module"] for error in found["errors"]] == list(example.compared)
    assert max(error["relative"] for error in found["errors"]) < EXACT
    assert all(error["rounding"] in (0.0, None) for error in found["errors"])  # it is float64 itself


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_float32_differs_by_its_rounding(example: Example) -> None:
    found, _, _ = fused_facts(example.model(torch.float32), example.given(torch.float32))
    assert [error["module"] for error in found["errors"]] == list(example.compared)
    for error in found["errors"]:
        assert 0 <= error["relative"] <= 8 * max(error["rounding"], torch.finfo(torch.float32).eps / 4)


def test_a_sample_stands_for_all_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES["pixels and tokens"]
    monkeypatch.setattr(activations, "_MOST", 29)
    monkeypatch.setattr(activations, "_FEWEST", 1)
    found, _, _ = fused_facts(example.model(), example.given())
    assert len(found["errors"]) == 2
    assert max(error["relative"] for error in found["errors"]) < EXACT


def test_a_wrong_weight_shows_where_it_stands() -> None:
    torch.manual_seed(0)
    example = EXAMPLES["stream"]

    class Spoiled(Facts):
        def __call__(self, planner: Any, plan: Any, original: nn.Module, fused: Any) -> None:
            with torch.no_grad():
                fused.v.weight[0] *= 1.01
            super().__call__(planner, plan, original, fused)

    facts = Spoiled()
    fuse_with_plan(example.model(), example.given(), observer=facts)
    errors = {error["module"]: error["relative"] for error in facts.finished()["errors"]}
    assert max(errors["first"], errors["u"]) < EXACT
    assert min(errors["v"], errors["last"]) > 1e-5


def test_the_rounding_is_that_of_the_original() -> None:
    example = EXAMPLES["another layer in between"]
    model, x = example.model(torch.float32), example.given(torch.float32)
    found, _, _ = fused_facts(model, x)
    exact = example.model(torch.float32).double()
    u, v = (error["rounding"] for error in found["errors"])
    with torch.no_grad():
        alive = model.n.weight != 0  # what a dead channel held cannot be had back
        expected = relative_error(exact.n(exact.u(x.double()))[:, alive], model.n(model.u(x))[:, alive])
        of_output = relative_error(exact(x.double()), model(x))
    assert u == pytest.approx(expected, rel=1e-6)
    assert v == pytest.approx(of_output, rel=1e-6)


def test_ranges_are_those_of_weights_and_outputs() -> None:
    example = EXAMPLES["another layer in between"]
    model, x = example.model(), example.given()
    found, fused, _ = fused_facts(model, x)
    entries = {entry["module"]: entry for entry in found["ranges"]}
    assert entries.keys() == {"u", "v"}
    for name, entry in entries.items():
        for when, owner in (("before", model), ("after", fused)):
            layer = owner.get_submodule(name)
            assert entry["weight"][when] == numbers(layer.weight.detach(), 0)
            with torch.no_grad():
                output = layer(x if name == "u" else owner.n(owner.u(x)).relu())
            assert entry["activation"][when] == pytest.approx(numbers(output, 1))
    assert entries["u"]["weight"]["before"] != entries["u"]["weight"]["after"]


def test_ranges_of_a_weight_that_is_made() -> None:
    example = EXAMPLES["computed weight"]
    model = example.model()
    found, fused, _ = fused_facts(model, example.given())
    weight = next(entry["weight"] for entry in found["ranges"] if entry["module"] == "u")
    assert weight["before"] == numbers(model.u.weight.detach(), 0)
    assert weight["after"] == pytest.approx(numbers(fused.u.weight.detach(), 0))


def test_a_plan_has_ranges_before_and_no_errors() -> None:
    example = EXAMPLES["stream"]
    found, _ = planned_facts(example.model(), example.given())
    assert found["errors"] == []
    assert [entry["module"] for entry in found["ranges"]] == list(example.compared)
    for entry in found["ranges"]:
        assert entry["activation"]["before"] is not None
        assert entry["activation"]["after"] is None


def test_a_model_that_fails_in_float64_has_no_rounding() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float64:
            raise RuntimeError("float32 only")
        return m.n(m.u(x))

    model = Net(forward, u=conv(), n=norm()).eval()
    found, _, _ = fused_facts(model, images())
    assert [error["rounding"] for error in found["errors"]] == [None]
    assert found["errors"][0]["relative"] < 1e-6


UNITS = [
    [Unit(torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, -1.0]]))],
    [Unit(torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, -1.0]]), inverse=True)],
    [Unit(None, torch.tensor([[1.0, -1.0]])), Unit(torch.tensor([[0.5]]), None, inverse=True)],
    [],
]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("most", [6, 4])
def test_undone(units: list[Unit], most: int) -> None:
    old = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    new = old
    for unit in units:
        scale, shift = unit.direct()
        new = new if scale is None else new * scale
        new = new if shift is None else new + shift
    sample = Sample((3, 2), most)
    assert torch.allclose(undone(sample.of(new), units, sample), sample.of(old), rtol=0, atol=1e-12)


def test_numbers() -> None:
    x = torch.arange(101.0).reshape(1, 101)
    found = numbers(x, 0)
    assert found == {
        "minimum": 0.0, "maximum": 100.0, "q01": 1.0, "q25": 25.0, "median": 50.0, "q75": 75.0, "q99": 99.0,
        "channel_spread": 1.0,
    }  # fmt: skip
    spread = numbers(torch.tensor([[1.0, -2.0, 30.0]]), 1)
    assert spread is not None
    assert spread["channel_spread"] == 15.0
    nothing = numbers(torch.zeros(2, 3), 0)
    assert nothing is not None
    assert nothing["channel_spread"] is None
    assert numbers(torch.full((2,), torch.nan), 0) is None
    assert numbers(torch.ones(0, 3), 0) is None
    assert numbers(torch.ones(3, dtype=torch.int64), 0) is None
    finite = numbers(torch.tensor([[1.0, torch.inf], [3.0, 2.0]]), 0)
    assert finite is not None
    assert finite["maximum"] == 3.0
