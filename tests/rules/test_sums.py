"""Sums: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import (
    BACKWARD,
    Case,
    Net,
    Removal,
    anything,
    check,
    check_goes,
    check_removed,
    conv,
    no_shift,
    norm,
    parameter,
)
from torch import Tensor, nn


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
    Case(
        lambda: Net(
            lambda m, x: m.n(F.conv2d(x, m.u.weight) + m.b["p"][:, None]),
            u=conv(bias=False),
            b=parameter([1.0, 2.0, 3.0, 4.0]),
            n=no_shift(),
        ),
        BACKWARD,
        ["n: backward: add in Net: an operand that is broadcast has no axis for the units"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(F.conv2d(x, m.u.weight) + (b := m.b["p"][None, :, None, None])) + b,
            u=conv(bias=False),
            b=parameter([1.0, 2.0]),
            n=anything(),
        ),
        BACKWARD,
        ["n: backward: add in Net: its operands would get different scales"],
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


BIASES: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: m.b["p"][0][None, :, None, None],
    lambda m, x: m.b["p"][0].view(1, -1, 1, 1),
    lambda m, x: m.b["p"][:1].unsqueeze(-1).unsqueeze(-1),
    lambda m, x: m.b["p"][0, :, None, None].expand(x.shape),
    lambda m, x: m.b["p"][0].reshape(1, -1, 1, 1).expand_as(x),
    lambda m, x: m.b["p"][0].reshape(1, -1, 1, 1).repeat(1, 1, 4, 4),
    lambda m, x: m.b["p"][1][[1, 0]][None, :, None, None].to(x.dtype),
    lambda m, x: -2 * m.b["p"][[1]][:, :, None, None],
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_is_added_apart(bias: Callable[[Any, Tensor], Tensor], dead: float) -> None:
    def make() -> nn.Module:
        return Net(
            lambda m, x: m.n(F.conv2d(x, m.u.weight) + bias(m, x)),
            u=conv(bias=False),
            b=parameter([[1.0, 2.0], [3.0, 4.0]]),
            n=nn.BatchNorm2d(2),
        )

    check_goes(Removal(make, ("u", "b"), dead=dead))
