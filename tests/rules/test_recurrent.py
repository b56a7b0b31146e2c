"""Recurrent: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, check, check_goes, norm
from torch import nn

CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.r(m.n(F.silu(x)))[0],
            r=nn.LSTM(4, 2, batch_first=True),
            n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d),
        ),
        FORWARD,
        ["n: forward: lstm in r (LSTM): its weight has one column for each feature"],
        inputs=lambda: (torch.linspace(-1, 1, 12).reshape(1, 3, 4),),
    ),
    Case(
        lambda: Net(
            lambda m, x: m.r(m.n(F.silu(x)).transpose(1, 2))[0],
            r=nn.LSTM(3, 2, batch_first=True, bias=False),
            n=norm([1.0] * 3, [1.0] * 3, nn.BatchNorm1d),
        ),
        FORWARD,
        ["n: forward: lstm in r (LSTM): it has no bias to take up a shift"],
        inputs=lambda: (torch.linspace(-1, 1, 12).reshape(1, 3, 4),),
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.r(x)[0]),
            r=nn.LSTM(4, 2, batch_first=True),
            n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d),
        ),
        BACKWARD,
        ["n: backward: lstm in r (LSTM): no scale or shift passes through its state"],
        inputs=lambda: (torch.linspace(-1, 1, 12).reshape(1, 3, 4),),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


def sequence() -> tuple[torch.Tensor]:
    """Batch, places, features."""
    return (torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(2, 5, 4),)


REMOVED = [
    Removal(
        lambda kind=kind: Net(
            lambda m, x: m.r(m.n(F.silu(x).mT).mT)[0], r=kind(4, 3, batch_first=True), n=nn.BatchNorm1d(4)
        ),
        ("r",),
        sequence,
    )
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
