"""Embedding: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
from rule_cases import BACKWARD, Case, Net, Removal, check, check_goes, norm
from torch import nn

CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.n(m.e(x)), e=nn.Embedding(4, 2), n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d)
        ),
        BACKWARD,
        ["n: backward: embedding in e (Embedding): its table has one row for each token"],
        inputs=lambda: (torch.tensor([[0, 1, 1]]),),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(
        lambda: Net(lambda m, i: m.n(m.e(i).mT), e=nn.Embedding(7, 4), n=nn.BatchNorm1d(4)),
        ("e",),
        lambda: (torch.tensor([[0, 3, 6], [1, 1, 2]]),),
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
