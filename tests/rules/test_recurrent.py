"""Recurrent: networks whose norm stays, with the exact reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, check, check_goes, norm
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def packed(x: Tensor, batch_first: bool = True) -> PackedSequence:
    """All steps of the first sample, and fewer of the others."""
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    return pack_padded_sequence(x, torch.tensor([steps, *[steps - 1] * (batch - 1)]), batch_first)


def padded(data: Tensor, like: PackedSequence, number: float = 0.0) -> Tensor:
    return pad_packed_sequence(PackedSequence(data, like.batch_sizes), True, number)[0]


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
    Case(
        lambda: Net(
            lambda m, x: m.r(packed(m.n(F.silu(x))))[1],
            r=nn.GRU(4, 2, batch_first=True),
            n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d),
        ),
        FORWARD,
        ["n: forward: _pack_padded_sequence in Net: the units vary along an axis whose places a tensor tells"],
        inputs=lambda: (torch.linspace(-1, 1, 24).reshape(2, 3, 4),),
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(padded(m.l(packed(x).data), packed(x)).mT),
            l=nn.Linear(4, 3),
            n=norm([2.0, -1.0, 1.0], [0.0, 3.0, 0.0], nn.BatchNorm1d),
        ),
        BACKWARD,
        ["n: backward: _pad_packed_sequence in Net: it pads with a number, which would not be shifted"],
        inputs=lambda: (torch.linspace(-1, 1, 24).reshape(2, 3, 4),),
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(padded(m.l(packed(x).data), packed(x), 7.0).mT),
            l=nn.Linear(4, 3),
            n=norm([2.0, -1.0, 1.0], [0.0, 0.0, 0.0], nn.BatchNorm1d),
        ),
        BACKWARD,
        ["n: backward: _pad_packed_sequence in Net: it pads with 7.0, which cannot be rescaled"],
        inputs=lambda: (torch.linspace(-1, 1, 24).reshape(2, 3, 4),),
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

REMOVED += [
    *(
        Removal(
            lambda kind=kind: Net(
                lambda m, x: pad_packed_sequence(m.r(packed(m.n(F.silu(x).mT).mT))[0], True)[0],
                r=kind(4, 3, num_layers=2, bidirectional=True, batch_first=True),
                n=nn.BatchNorm1d(4),
            ),
            ("r",),
            sequence,
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ),
    Removal(
        lambda: Net(
            lambda m, x, lengths: m.r(pack_padded_sequence(m.n(F.silu(x).mT).mT, lengths, True, False))[1],
            r=nn.GRU(4, 3, batch_first=True),
            n=nn.BatchNorm1d(4),
        ),
        ("r",),
        lambda: (*sequence(), torch.tensor([3, 5])),
        options={"batch": 0},
    ),
    Removal(
        lambda: Net(
            lambda m, x: m.r(packed(m.n(F.silu(x).mT).permute(2, 0, 1), False))[1], r=nn.GRU(4, 3), n=nn.BatchNorm1d(4)
        ),
        ("r",),
        sequence,
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(packed(m.l(x)).data), l=nn.Linear(4, 3), n=nn.BatchNorm1d(3)), ("l",), sequence
    ),
    Removal(
        lambda: Net(
            lambda m, x: m.n(padded(m.l(packed(x).data), packed(x)).mT), l=nn.Linear(4, 3), n=nn.BatchNorm1d(3)
        ),
        ("l",),
        sequence,
        shiftless=True,
    ),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal, dead: float) -> None:
    check_goes(replace(case, dead=dead))
