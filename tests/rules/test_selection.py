"""Selection: networks whose norm goes, and networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
from rule_cases import BACKWARD, Case, Net, Removal, anything, check, check_goes, conv, no_shift
from torch import nn

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(torch.maximum(m.u(x), m.v(x))), u=conv(), v=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: maximum in Net: no negative scale passes through a maximum"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).masked_fill(x > 0, 0.0)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: masked_fill in Net: it puts in a number that does not change with the units"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(
        lambda: Net(lambda m, x: m.n(torch.maximum(m.u(x), m.v(x))), u=conv(), v=conv(), n=nn.BatchNorm2d(2)),
        ("u", "v"),
        positive=True,
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(torch.where(x > 0, m.u(x), m.v(x))), u=conv(), v=conv(), n=nn.BatchNorm2d(2)),
        ("u", "v"),
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(m.u(x).masked_fill(x > 0, 0.0)), u=conv(), n=nn.BatchNorm2d(2)),
        ("u",),
        shiftless=True,
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
