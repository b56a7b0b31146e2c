"""Sampling: networks whose norm goes, and one whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, Case, Net, Removal, anything, check, check_goes, conv, image
from torch import nn


def sampled(y: torch.Tensor, x: torch.Tensor, padding: str) -> torch.Tensor:
    grid = x.mean((1, 2, 3), keepdim=True).tanh().expand(-1, 3, 3, 2)
    return F.grid_sample(y, grid, padding_mode=padding, align_corners=False)


CASES = [
    Case(
        lambda: Net(
            lambda m, x, grid: m.n(F.grid_sample(m.u(x), grid, padding_mode="zeros", align_corners=False)),
            u=conv(),
            n=anything(),
        ),
        BACKWARD,
        ["n: backward: grid_sampler in Net: it takes no shift: it samples zeros outside of the image"],
        lambda: (image(), torch.zeros(1, 3, 3, 2)),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(lambda: Net(lambda m, x: m.n(sampled(m.u(x), x, "border")), u=conv(), n=nn.BatchNorm2d(2)), ("u",)),
    Removal(
        lambda: Net(lambda m, x: m.n(sampled(m.u(x), x, "zeros")), u=conv(), n=nn.BatchNorm2d(2)),
        ("u",),
        shiftless=True,
    ),
    Removal(
        lambda: Net(lambda m, x: m.v(F.unfold(m.n(F.silu(x)), 2, stride=2)), v=nn.Conv1d(8, 3, 1), n=nn.BatchNorm2d(2)),
        ("v",),
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(F.fold(m.u(x), 4, 2, stride=2)), u=nn.Conv1d(8, 8, 1), n=nn.BatchNorm2d(2)),
        ("u",),
        lambda: (torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(2, 8, 4),),
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
