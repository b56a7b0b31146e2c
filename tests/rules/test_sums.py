"""Sums: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_cases import BACKWARD, Case, Net, anything, check, check_removed, conv, no_shift, norm
from torch import nn


def outer(m, x):
    return m.n((m.u(x).unsqueeze(2) + m.v(x).unsqueeze(1)).flatten(1))


CASES = [
    Case(
        lambda: Net(lambda m, x: m.n((y := m.u(x)) - y), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: sub in Net: it subtracts a tensor from itself"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x) + m.v(x)), u=conv(), v=conv(2, 1), n=no_shift()),
        BACKWARD,
        ["n: backward: add in Net: an operand that is broadcast has no axis for the units"],
    ),
    Case(
        lambda: Net(
            outer, u=nn.Linear(4, 2), v=nn.Linear(4, 2), n=norm([1.0] * 4, [1.0, 2.0, 3.0, 4.0], nn.BatchNorm1d)
        ),
        BACKWARD,
        ["n: backward: add in Net: none of its operands has an axis for the shift"],
        inputs=lambda: (torch.ones(1, 4),),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(m.u(x) + m.v(x)), BACKWARD),
    (lambda m, x: m.n(m.u(x) - 3), BACKWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
