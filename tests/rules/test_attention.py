"""Attention: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, check, check_goes, conv, no_shift
from torch import nn

CASES = [
    Case(
        lambda: Net(lambda m, x: F.scaled_dot_product_attention(m.n(F.silu(x)), x, x), n=no_shift()),
        FORWARD,
        ["n: forward: scaled_dot_product_attention in Net: no scale or shift passes through queries, keys and masks"],
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


def sequence() -> tuple[torch.Tensor]:
    """Batch, places, features."""
    return (torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(2, 5, 4),)


def projections() -> dict[str, nn.Module]:
    return {**{name: nn.Linear(4, 4) for name in "qkv"}, "n": nn.BatchNorm1d(4)}


REMOVED = [
    Removal(
        lambda: Net(
            lambda m, x: m.n(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)).transpose(1, 2)), **projections()
        ),
        ("v",),
        sequence,
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(((m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)).transpose(1, 2)), **projections()),
        ("v",),
        sequence,
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
