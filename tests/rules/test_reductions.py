"""Reductions: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, check_removed, conv, no_shift, norm, shift_alone

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(F.max_pool2d(m.u(x), 2)), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: max_pool2d in Net: a maximum passes no negative scale"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.avg_pool2d(m.u(x), 3, padding=1)), u=conv(), n=anything()),
        BACKWARD,
        [
            "n: backward: avg_pool2d in Net: it does not divide by the number of elements that it adds, so no shift passes"
        ],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x)).mean(1, keepdim=True)), u=conv(1), n=anything()),
        FORWARD,
        ["n: forward: mean in Net: the units differ among the elements that it pools"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.avg_pool2d(m.u(x), 2).transpose(1, 2)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: avg_pool2d in Net: the units differ among its outputs"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x)).sum(1, keepdim=True)), u=conv(1), n=anything()),
        FORWARD,
        ["n: forward: sum in Net: it adds elements with different scales"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).std(3, keepdim=True)), u=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: std in Net: a deviation takes no shift"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).std(3, keepdim=True)), u=conv(), n=norm([-1.0, 1.0], [0.0, 0.0])),
        BACKWARD,
        ["n: backward: std in Net: a deviation takes no negative scale"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(F.avg_pool2d(m.u(x), 2)), BACKWARD),
    (lambda m, x: m.v(m.n(F.silu(m.u(x))).mean((2, 3), keepdim=True)), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
