"""Attention: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, check, conv, no_shift

CASES = [
    Case(
        lambda: Net(lambda m, x: F.scaled_dot_product_attention(m.n(F.silu(x)), x, x), n=no_shift()),
        FORWARD,
        ["n: forward: scaled_dot_product_attention in Net: queries, keys and masks pass no change of units"],
        inputs=lambda: (torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2),),
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.scaled_dot_product_attention(x, (y := m.u(x)), y)), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: scaled_dot_product_attention in Net: its values are also its keys or queries"],
        inputs=lambda: (torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2),),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
