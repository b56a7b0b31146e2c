"""Deformable convolutions: networks whose norm goes, and networks whose norm stays, with the exact reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, anything, check, check_goes, conv, no_shift
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d


def offsets(channels: int = 2) -> nn.Conv2d:
    """Two numbers for each of nine taps, small enough to stay near the image."""
    made = conv(channels, 18, 3, padding=1)
    made.weight.data *= 0.3
    return made


def deformed(m: Any, x: Tensor) -> Tensor:
    return m.d(x, m.o(x))


def net(function: Any, **options: Any) -> Net:
    return Net(
        function,
        d=DeformConv2d(2, 2, 3, padding=1, **options),
        o=offsets(),
        k=conv(2, 9),
        n=nn.BatchNorm2d(2),
    )


CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.n(deform_conv2d(x, m.o(x), m.d.weight, padding=1)),
            d=DeformConv2d(2, 2, 3, padding=1, bias=False),
            o=offsets(),
            n=anything(),
        ),
        BACKWARD,
        ["n: backward: zeros in Net: it makes a constant"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.d(m.n(F.silu(x)), m.o(x)),
            d=DeformConv2d(2, 2, 3, padding=1, bias=False),
            o=offsets(),
            n=anything(),
        ),
        FORWARD,
        [
            "n: forward: torchvision::deform_conv2d in d (DeformConv2d): it takes no shift of its input: "
            "it pads with zeros, which would not be shifted"
        ],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.d(x, m.n(F.silu(m.o(x)))),
            d=DeformConv2d(2, 2, 1, bias=False),
            o=conv(),
            n=no_shift(),
        ),
        FORWARD,
        ["n: forward: torchvision::deform_conv2d in d (DeformConv2d): its offsets cannot change units"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(lambda: net(lambda m, x: m.n(deformed(m, x))), ("d",)),
    Removal(lambda: net(lambda m, x: m.n(deformed(m, x)), bias=False), ("d",)),
    Removal(lambda: net(lambda m, x: m.n(m.d(x, m.o(x), m.k(x).sigmoid())), bias=False), ("d",)),
    Removal(
        lambda: Net(
            lambda m, x: m.n(m.d(x, m.o(x))),
            d=DeformConv2d(2, 4, 3, padding=1, groups=2, bias=False),
            o=offsets(),
            n=nn.BatchNorm2d(4),
        ),
        ("d",),
    ),
    Removal(
        lambda: net(lambda m, x: m.d(m.n(F.silu(x)), m.o(x)), bias=False),
        ("d",),
        shiftless=True,
    ),
    Removal(lambda: net(lambda m, x: m.n(deformed(m, x) + m.d(x.square(), m.o(x))), bias=False), ("d",)),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal, dead: float) -> None:
    check_goes(replace(case, dead=dead))
