"""Norms: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import (
    BACKWARD,
    FORWARD,
    Case,
    Net,
    Removal,
    anything,
    check,
    check_goes,
    conv,
    no_shift,
    norm,
    shift_alone,
)
from torch import nn

CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.n(m.l(x)), l=nn.LayerNorm(4), n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d)
        ),
        BACKWARD,
        ["n: backward: layer_norm in l (LayerNorm): its gain and bias have no axis for the units"],
        inputs=lambda: (torch.linspace(-1, 1, 12).reshape(1, 3, 4),),
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.k(F.silu(x)).transpose(1, 2)),
            k=no_shift(),
            n=norm([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]),
        ),
        BACKWARD,
        [
            "k: backward: silu in Net: no scale or shift passes through it",
            "n: backward: batch_norm in k (BatchNorm2d): it has one gain and bias per channel",
        ],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.instance_norm(m.u(x))), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: instance_norm in Net: it has no weight to take up a scale, and none can be added"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.instance_norm(m.u(x))), u=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: instance_norm in Net: it has no bias to take up a shift, and none can be added"],
    ),
    Case(
        lambda: Net(lambda m, x: m.g(m.n(F.silu(x))), g=nn.GroupNorm(1, 2), n=anything()),
        FORWARD,
        ["n: forward: group_norm in g (GroupNorm): its statistics come from its input, which must stay as it is"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(lambda: Net(lambda m, x: m.n(m.g(x)), g=nn.GroupNorm(1, 2), n=nn.BatchNorm2d(2)), ("g",)),
    Removal(
        lambda: Net(lambda m, x: m.n(m.l(x).mT), l=nn.LayerNorm(4), n=nn.BatchNorm1d(4)),
        ("l",),
        lambda: (torch.linspace(-1, 1, 40, dtype=torch.float64).square().reshape(2, 5, 4),),
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
