"""Slicing: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, conv

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)[:, [0, 0]]), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: index in Net: it takes an element more than once"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)[:, [0, 1], [0, 1]].unsqueeze(3)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: index in Net: the units vary along an axis whose places a tensor tells"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x))[:, torch.tensor([True, True])]), u=conv(), n=anything()),
        FORWARD,
        ["n: forward: index in Net: the units vary along an axis whose places a tensor tells"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).narrow(1, torch.tensor(0), 2)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: narrow in Net: its start is a tensor"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
