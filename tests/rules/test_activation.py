"""Activation: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, check, check_goes, conv, no_shift, shift_alone
from torch import nn

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
]


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
