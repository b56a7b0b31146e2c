"""A step with which a norm stays that goes without it is not taken."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from restructuring.test_merging import IMAGE, conv, conv_norm
from rule_cases import Net
from support import fused_and_checked, prepared
from torch import Tensor, nn

import bnfuse
from bnfuse.planner.planner import Planner
from bnfuse.reasons import COSTS_NORMS
from bnfuse.restructuring.losses import Gone, costly


class BesidePadding(nn.Module):
    """The norm's units go through ``b``, which has no padding. What ``b`` and ``c`` become pads and takes no shift."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(padding=0), nn.BatchNorm2d(4)
        self.b, self.c = conv(1, bias=False), conv()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.n(x), self.c(self.b(x))


class Several(nn.Module):
    """A step that costs a norm, between two that cost none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv_norm(), conv_norm(1)
        self.beside = BesidePadding()
        self.three, self.four = conv_norm(), conv_norm(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.beside((self.one(x) + self.two(x)).sin())
        return x, (self.three(y) + self.four(y)).sin()


def test_a_step_that_costs_a_norm_is_not_taken() -> None:
    plan, fused = fused_and_checked(prepared(BesidePadding()), IMAGE, restructure="merge")
    assert not plan.steps
    assert [one.norm for one in plan.fused] == ["n"]
    assert type(fused.c) is nn.Conv2d
    assert [(one.subject, one.reason) for one in plan.unchanged] == [("b", COSTS_NORMS.reason())]


def test_the_others_are() -> None:
    plan, fused = fused_and_checked(prepared(Several()), IMAGE, restructure=["bake", "untie", "merge"])
    assert [step.subject for step in plan.steps] == ["one", "three"]
    assert len(plan.fused) == 5
    assert not plan.kept
    assert [one.subject for one in plan.unchanged] == ["beside.b"]
    assert type(fused.beside.n) is nn.Identity


def test_nor_is_it_lost_where_it_can_become_an_addition() -> None:
    """A norm that clips take costs nothing then, and the layers may be one."""
    plan, _ = fused_and_checked(prepared(Several()), IMAGE, restructure=True)
    assert {step.subject for step in plan.steps if step.kind == "merge"} == {"one", "three", "beside.b"}
    assert [step.subject for step in plan.steps if step.kind == "clip"] == ["beside.n"]
    assert not plan.kept


def test_what_a_budget_keeps_is_no_loss() -> None:
    model = prepared(Several())
    plan = bnfuse.plan(model, IMAGE, restructure="merge", options=bnfuse.Options(budget=1e-30))
    assert [step.subject for step in plan.steps] == ["one", "three"]
    assert [one.norm for one in plan.kept] == ["beside.n"]


def test_a_norm_that_the_caller_keeps_is_no_loss() -> None:
    plan = bnfuse.plan(prepared(BesidePadding()), IMAGE, restructure="merge", keep="n")
    assert [step.subject for step in plan.steps] == ["b"]


@pytest.mark.parametrize(
    ("model", "plans"),
    [(lambda: Net(lambda m, x: m.a(x) + m.b(x), a=conv_norm(), b=conv_norm(1)), 1), (Several, 5)],
)
def test_plans_are_made_only_where_a_norm_stays(model: Any, plans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda *given: (made.append(given), plan(*given))[1])
    bnfuse.plan(prepared(model()), IMAGE, restructure="merge")
    assert len(made) == plans


# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "gives", "blamed"),
    [
        ({"b": "x"}, {}, "b"),
        ({"a": "x", "d": "yz"}, {}, "ad"),
        ({"a": "x", "b": "x"}, {}, "ab"),  # each by itself
        ({"ac": "x"}, {}, "c"),  # together only
        ({"a": "x"}, {"a": "uv"}, ""),  # gives more than it costs
        ({"a": "x"}, {"a": "u"}, ""),
        ({"a": "xy"}, {"a": "u"}, "a"),
        ({"a": "x", "b": "y"}, {"b": "uv"}, "a"),
        ({"abcd": "xyz"}, {"a": "u"}, "d"),
        ({"ab": "x", "cd": "x", "ad": "x"}, {}, "bd"),
    ],
)
def test_who_is_to_blame(costs: dict[str, str], gives: dict[str, str], blamed: str) -> None:
    steps: list[Any] = [SimpleNamespace(name=name) for name in "abcd"]

    def go_with(some: Sequence[Any]) -> Gone:
        there = {step.name for step in some}
        lost = {norm for names, norms in costs.items() if there >= set(names) for norm in norms}
        return Gone(norm for norm in {*"xyz", *_all(gives, there)} if norm not in lost)

    found = costly(steps, go_with([]), go_with)
    assert "".join(step.name for step in found) == blamed
    rest = [step for step in steps if step not in found]
    assert go_with(rest).total() >= max(go_with([]).total(), go_with(steps).total())


def test_many_are_not_all_told_apart() -> None:
    steps: list[Any] = [SimpleNamespace(bad=bool(number % 2)) for number in range(100)]
    tried = []

    def go_with(some: Sequence[Any]) -> Gone:
        tried.append(some)
        return Gone(str(number) for number, step in enumerate(steps) if not step.bad or step not in some)

    found = costly(steps, go_with([]), go_with)
    assert all(step in found for step in steps if step.bad)
    assert len(tried) < 100


def _all(gives: dict[str, str], there: Collection[str]) -> str:
    return "".join(norms for name, norms in gives.items() if name in there)
