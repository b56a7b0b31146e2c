"""Activation: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, check, conv, no_shift, shift_alone

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(F.relu(m.u(x))), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: relu in Net: it passes no negative scale"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.relu(m.u(x))), u=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: relu in Net: it passes no shift"],
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
