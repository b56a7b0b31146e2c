"""Biases that a layer of the model's own was made without, and that its forward would add in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, Case, Net, Removal, check, check_goes, image, no_shift, norm
from support import fused_and_checked, prepared
from torch import Tensor, nn


class Layer(nn.Module):
    """A weight, a bias that may be missing, and a forward of its own."""

    def __init__(self, function: Callable[..., Tensor], *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))
        self.register_parameter("bias", nn.Parameter(torch.randn(shape[0])) if bias else None)
        self.out_features = shape[0]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def graph_convolution(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    y = adjacency @ (x @ m.weight.t())
    return y + m.bias if m.bias is not None else y


def convolution(m: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, m.weight)
    if m.bias is not None:
        y = y + m.bias[None, :, None, None]
    return y


def in_place(m: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, m.weight)
    if m.bias is not None:
        y += m.bias.view(1, -1, 1, 1)
    return y


def swapped(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bohw", x, m.weight)
    return y if m.bias is None else m.bias.reshape(-1, 1, 1) + y


def channels_last(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bhwo", x, m.weight)
    return y if m.bias is None else y + m.bias


def plus_bias(m: Any, x: Tensor) -> Tensor:
    y = 2 * x
    return y if m.bias is None else y + m.bias


def nodes() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (3, 4))


GOES = [
    Removal(
        lambda: Net(lambda m, x, a: m.n(m.u(x, a)), u=Layer(graph_convolution, 5, 3), n=nn.BatchNorm1d(5)),
        ("u",),
        nodes,
        options={"batch": 0},
    ),
    Removal(
        lambda: Net(lambda m, x, a: m.n(m.u(x, a)), u=Layer(graph_convolution, 5, 3, bias=True), n=nn.BatchNorm1d(5)),
        ("u",),
        nodes,
        options={"batch": 0},
    ),
    *(
        Removal(
            lambda function=function, shape=shape: Net(
                lambda m, x: m.n(m.u(x)), u=Layer(function, *shape), n=nn.BatchNorm2d(3)
            ),
            ("u",),
        )
        for function, shape in ((convolution, (3, 2, 1, 1)), (in_place, (3, 2, 1, 1)), (swapped, (3, 2)))
    ),
    Removal(
        lambda: Net(
            lambda m, x: F.relu_(m.n(m.u(x).permute(0, 3, 1, 2))), u=Layer(channels_last, 3, 2), n=nn.BatchNorm2d(3)
        ),
        ("u",),
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(m.u(x)) * m.n(m.u(x.square())), u=Layer(swapped, 3, 2), n=nn.BatchNorm2d(3)),
        ("u",),
    ),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("case", GOES)
def test_norm_goes(case: Removal, dead: float) -> None:
    check_goes(replace(case, dead=dead))


def test_a_bias_is_created_only_for_a_shift() -> None:
    model = Net(lambda m, x: m.n(m.u(x)), u=Layer(swapped, 2, 2), n=no_shift())
    plan, fused = fused_and_checked(model.double().eval(), image().double())
    assert plan.decisions[0].into == ("u",)
    assert fused.u.bias is None


def test_units_along_another_axis_pass_what_has_no_bias() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.n(m.u(m.v(x)))

    model = Net(forward, v=nn.Conv2d(2, 2, 1), u=Layer(plus_bias, 4), n=no_shift())
    plan, _ = fused_and_checked(model.double().eval(), image().double())
    assert plan.decisions[0].into == ("v",)


def test_a_norm_after_another_takes_the_created_bias_too() -> None:
    model = Net(lambda m, x: m.k(m.n(m.u(x))), u=Layer(swapped, 2, 2), n=nn.BatchNorm2d(2), k=nn.BatchNorm2d(2))
    plan, _ = fused_and_checked(prepared(model), image().double())
    assert len(plan.fused) == 2


def scaled_afterwards(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bohw", x, m.weight)
    return (y if m.bias is None else y + m.bias[:, None, None]) * 2


def doubled(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bohw", x, m.weight)
    return y if m.bias is None else y + 2 * m.bias[:, None, None]


def multiplied(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bohw", x, m.weight)
    return y if m.bias is None else y * m.bias.exp()[:, None, None]


def looked_at(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bohw", x, m.weight)
    if m.bias is None:
        return y
    m.largest = y.max()
    return y + m.bias[:, None, None]


def read_before(m: Any, x: Tensor) -> Tensor:
    y = torch.einsum("bihw,oi->bohw", x, m.weight)
    m.largest = y.max()
    return y if m.bias is None else y + m.bias[:, None, None]


NO_BIAS = "n: backward: einsum in u (Layer): it has no bias to take up a shift, and none can be added"

CASES = [
    *(
        Case(
            lambda function=function: Net(
                lambda m, x: m.n(m.u(x)), u=Layer(function, 2, 2), n=norm([1.0, 1.0], [1.0, 3.0])
            ),
            BACKWARD,
            [NO_BIAS],
        )
        for function in (scaled_afterwards, doubled, multiplied, looked_at)
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=Layer(read_before, 2, 2), n=norm([1.0, 1.0], [1.0, 3.0])),
        BACKWARD,
        ["n: backward: max in u (Layer): no scale or shift passes through it"],
    ),
]


def hooked() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.inner(x)
        return y if m.bias is None else y + m.bias[:, None, None]

    layer = Layer(forward, 2)
    layer.inner = nn.Conv2d(2, 2, 1, bias=False)
    layer.inner.register_forward_hook(lambda module, inputs, output: None)
    return Net(lambda m, x: m.n(m.u(x)), u=layer, n=no_shift())


CASES.append(
    Case(
        hooked,
        BACKWARD,
        [
            "n: backward: conv2d in u.inner (Conv2d): its output cannot change units: a hook on u.inner (Conv2d) reads it"
        ],
    )
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
