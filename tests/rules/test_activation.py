"""Activation: networks whose norm stays, with the exact reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, check, check_goes, conv, no_shift, norm, shift_alone
from support import fused_and_checked
from torch import Tensor, nn

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(F.relu(m.u(x))), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: relu in Net: no negative scale passes through it"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.relu(m.u(x))), u=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: relu in Net: no shift passes through it"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).clamp(min=1)), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: clamp in Net: it changes its slope elsewhere than at 0"],
    ),
    Case(
        lambda: Net(lambda m, x: F.prelu(m.u(x), m.n(F.silu(x)).mean((0, 2, 3))), u=conv(), n=no_shift()),
        FORWARD,
        ["n: forward: prelu in Net: its slope cannot change"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.relu6(m.u(x))), u=conv(), n=halved()),
        BACKWARD,
        ["n: backward: relu6 in Net: it changes its slope elsewhere than at 0"],
    ),
    Case(
        lambda: Bounded(F.relu6, n=norm([0.5, 1.5], [0.0, 0.0])),
        BACKWARD,
        ["n: backward: relu6 in Bounded: it changes its slope elsewhere than at 0"],
    ),
]


def halved() -> Any:
    return norm([0.5, 0.25], [0.0, 0.0])


class Bounded(Net):
    """A function after a minimum with a parameter."""

    def __init__(self, function: Any, height: float = 6.0, **layers: nn.Module) -> None:
        super().__init__(lambda m, x: m.n(function(torch.minimum(m.u(x), m.upper))), u=conv(), **layers)
        self.upper = nn.Parameter(torch.full((2, 1, 1), height))


@pytest.mark.parametrize(
    "function", [F.relu6, lambda x: x.clamp(0, 6), lambda x: F.hardtanh(x, 0, 6)], ids=["relu6", "clamp", "hardtanh"]
)
def test_a_bound_from_above_that_is_never_reached_does_not_count(function: Any) -> None:
    x = 20 * torch.randn(2, 2, 4, 4, dtype=torch.float64)
    plan, fused = fused_and_checked(Bounded(function, n=halved()).double().eval(), x)
    assert set(plan.fused[0].into) == {"u", "upper"}
    assert fused.upper.flatten().tolist() == [3.0, 1.5]


def test_a_bound_from_above_that_is_reached_counts() -> None:
    x = 20 * torch.randn(2, 2, 4, 4, dtype=torch.float64)
    plan, _ = fused_and_checked(Bounded(F.relu6, height=6.5, n=halved()).double().eval(), x)
    assert not plan.fused

    def returned(m: Any, x: Tensor) -> Tensor:
        y = torch.minimum(m.u(x), m.upper)
        return m.n(F.relu6(y)) + F.relu6(y)

    model = Bounded(F.relu6, n=halved())
    model.function = returned
    plan, _ = fused_and_checked(model.double().eval(), x)
    assert not plan.fused


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


ONLY_POSITIVE = {"positive": True, "shiftless": True}

REMOVED = [
    Removal(lambda: Net(lambda m, x: m.n(F.relu(m.u(x))), u=conv(), n=nn.BatchNorm2d(2)), ("u",), **ONLY_POSITIVE),
    Removal(
        lambda: Net(lambda m, x: m.n(F.leaky_relu(m.u(x))), u=conv(), n=nn.BatchNorm2d(2)), ("u",), **ONLY_POSITIVE
    ),
    Removal(lambda: Net(lambda m, x: m.n(m.u(x).clamp(min=0)), u=conv(), n=nn.BatchNorm2d(2)), ("u",), **ONLY_POSITIVE),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
