"""Custom layer: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Odd, Removal, anything, check, check_goes, fold, norm
from torch import nn

import bnfuse

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


REMOVED = [
    Removal(
        lambda: Net(lambda m, x: m.n(m.o(x)), o=Odd(), n=nn.BatchNorm2d(2)),
        ("o",),
        positive=True,
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)
