"""Custom layer: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, anything, check, check_goes, norm
from torch import nn

import bnfuse


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.ones(2, 1, 1)), nn.Parameter(torch.zeros(2, 1, 1)))

    def forward(self, x):
        return x.sin() * self.gain.exp().log() + self.offset


def fold(layer, scale, shift):
    layer.gain.data = (scale.view(2, 1, 1) * layer.gain).float()
    layer.offset.data = (scale.view(2, 1, 1) * layer.offset + shift.view(2, 1, 1)).float()


CASES = [
    Case(
        lambda: Net(lambda m, x: m.o(m.n(F.silu(x))), o=Odd(), n=anything()),
        FORWARD,
        ["n: forward: handled in o (Odd): its handler takes no units of its input"],
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.o(x).transpose(1, 2)), o=Odd(), n=norm([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
        ),
        BACKWARD,
        ["n: backward: handled in o (Odd): its handler takes units per channel, along axis 1"],
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


def fold_exactly(layer: Odd, scale: torch.Tensor, shift: torch.Tensor) -> None:
    layer.gain.mul_(scale.view(2, 1, 1))
    layer.offset.mul_(scale.view(2, 1, 1)).add_(shift.view(2, 1, 1))


REMOVED = [
    Removal(
        lambda: Net(lambda m, x: m.n(m.o(x)), o=Odd(), n=nn.BatchNorm2d(2)),
        ("o",),
        positive=True,
        options={"options": bnfuse.Options(handlers={Odd: fold_exactly})},
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
