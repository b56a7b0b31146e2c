"""Einstein sums: a network whose norm goes, and one whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, Case, Net, Removal, anything, check, check_goes, parameter
from torch import nn

CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.n(torch.einsum("bchw,dc->bdhw", F.silu(x), m.p.p)),
            p=parameter([[1.0, 2.0], [-1.0, 0.5]]),
            n=anything(),
        ),
        BACKWARD,
        ["n: backward: einsum in Net: it has no bias to take up a shift, and none can be added"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(
        lambda: Net(
            lambda m, x: m.n(torch.einsum("bchw,dc->bdhw", F.silu(x), m.p.p)),
            p=parameter([[1.0, 2.0], [-1.0, 0.5]]),
            n=nn.BatchNorm2d(2),
        ),
        ("p",),
        shiftless=True,
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
