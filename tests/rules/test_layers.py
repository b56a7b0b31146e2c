"""Layers: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import (
    BACKWARD,
    FORWARD,
    Case,
    Net,
    anything,
    check,
    check_removed,
    conv,
    dead_channel,
    image,
    no_shift,
    norm,
    shift_alone,
)
from torch import nn


def nearly_out_of_range():
    net = Net(lambda m, x: m.n(m.u(x)), u=conv(), n=norm([60000.0, 1.0], [0.0, 0.0])).half()
    net.u.weight.data *= 0
    net.u.weight.data += 2
    return net


CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x) @ m.v(x)), u=conv(), v=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: matmul in Net: its weights do not sum to one, so no shift passes"],
        inputs=lambda: (torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2),),
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).softmax(-1) @ m.v(x)[0, :1]), u=conv(), v=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: matmul in Net: its operands have different numbers of axes"],
        inputs=lambda: (torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2),),
    ),
    Case(
        lambda: Net(lambda m, x: m.n((m.u(x).softmax(-1) @ m.v(x)).transpose(1, 2)), u=conv(), v=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: matmul in Net: it mixes elements with different units"],
        inputs=lambda: (torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2),),
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.silu(x)) @ m.u(x), u=conv(), n=no_shift()),
        FORWARD,
        ["n: forward: matmul in Net: its left factor passes no change of units"],
        inputs=lambda: (torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2),),
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.l(x)), l=nn.Linear(4, 2), n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d)
        ),
        BACKWARD,
        ["n: backward: linear in l (Linear): its weight has no axis for units that vary along axis 1 of its output"],
        inputs=lambda: (torch.linspace(-1, 1, 12).reshape(1, 3, 4),),
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.conv2d(x, m.u.weight)), u=conv(bias=False), n=anything()),
        BACKWARD,
        ["n: backward: conv2d in Net: it has no bias to take up a shift, and none can be added"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x))), u=conv(size=3, padding=1), n=anything()),
        FORWARD,
        [
            "n: forward: conv2d in u (Conv2d): it takes no shift of its input: it pads with zeros, which would not be shifted"
        ],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x))), u=nn.ConvTranspose2d(2, 2, 2, 2), n=anything()),
        FORWARD,
        [
            "n: forward: conv_transpose2d in u (ConvTranspose2d): it takes no shift of its input: not every output has the same taps"
        ],
    ),
    Case(
        lambda: Net(lambda m, x: m.v(m.n(F.silu(x)) + m.u(x)), u=conv(), v=conv(), n=dead_channel()),
        FORWARD,
        ["n: forward: conv2d in u (Conv2d): it would have to undo a scale of (nearly) 0"],
    ),
    Case(
        nearly_out_of_range,
        BACKWARD,
        ["n: backward: conv2d in u (Conv2d): u.weight would leave the range of torch.float16"],
        inputs=lambda: (image().half(),),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(m.u(x)), BACKWARD),
    (lambda m, x: m.v(m.n(F.silu(m.u(x)))), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
