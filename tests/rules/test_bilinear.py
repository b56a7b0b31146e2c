"""Bilinear layers: networks whose norm goes, and networks whose norm stays, with the exact reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, check, check_goes, norm
from torch import Tensor, nn


def features() -> Any:
    return norm([2.0, -1.0, 3.0], [1.0, 3.0, 0.0], nn.BatchNorm1d)


def rows() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(1, 2, 8).sin().reshape(4, 2)


def double_rows() -> tuple[Tensor, Tensor]:
    x, y = rows()
    return x.double(), y.double()


CASES = [
    Case(
        lambda: Net(lambda m, x, y: m.b(m.n(F.silu(x)), y), b=nn.Bilinear(3, 2, 3), n=features()),
        FORWARD,
        ["n: forward: bilinear in b (Bilinear): no shift passes through it"],
        rows,
    ),
    Case(
        lambda: Net(lambda m, x, y: m.n(F.bilinear(x, y, m.b.weight)), b=nn.Bilinear(3, 2, 3), n=features()),
        BACKWARD,
        ["n: backward: bilinear in Net: it has no bias to take up a shift, and none can be added"],
        rows,
    ),
    Case(
        lambda: Net(lambda m, x, y: m.n(m.b(x[None, :3], y[None, :3])), b=nn.Bilinear(3, 2, 4), n=features()),
        BACKWARD,
        [
            "n: backward: bilinear in b (Bilinear): its weight has no axis for units that vary along axis 1 of its output"
        ],
        rows,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(
        lambda: Net(lambda m, x, y: m.n(m.b(x, y)), b=nn.Bilinear(3, 2, 3), n=nn.BatchNorm1d(3)), ("b",), double_rows
    ),
    Removal(
        lambda: Net(lambda m, x, y: m.n(m.b(x, y)), b=nn.Bilinear(3, 2, 3, bias=False), n=nn.BatchNorm1d(3)),
        ("b",),
        double_rows,
    ),
    Removal(
        lambda: Net(lambda m, x, y: m.b(m.n(F.silu(x)), y), b=nn.Bilinear(3, 2, 3), n=nn.BatchNorm1d(3)),
        ("b",),
        double_rows,
        shiftless=True,
    ),
    Removal(
        lambda: Net(lambda m, x, y: m.b(y, m.n(F.silu(x))), b=nn.Bilinear(2, 3, 3, bias=False), n=nn.BatchNorm1d(3)),
        ("b",),
        double_rows,
        shiftless=True,
    ),
    Removal(
        lambda: Net(lambda m, x, y: m.b(z := m.n(F.silu(x)), z), b=nn.Bilinear(3, 3, 4), n=nn.BatchNorm1d(3)),
        ("b",),
        double_rows,
        shiftless=True,
    ),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal, dead: float) -> None:
    check_goes(replace(case, dead=dead))
