"""Search: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, conv, dead_channel, norm, parameter
from torch import nn

import bnfuse


def negative_variance():
    broken = anything()
    broken.running_var = torch.tensor([-1.0, 1.0])
    return Net(lambda m, x: m.n(m.u(x)), u=conv(), n=broken)


CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(torch.cumsum(m.u(x), 2)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: cumsum in Net: no scale or shift passes through it"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.v(m.n(F.silu(x)) + m.table.p),
            v=conv(),
            table=parameter([[[1.0]], [[1.0]]]),
            n=dead_channel(),
        ),
        FORWARD,
        ["n: forward: table.p cannot change units: a scale of (nearly) 0 would have to be undone"],
    ),
    Case(
        negative_variance,
        BACKWARD,
        ["n: backward: n: its statistics or parameters are not finite"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=norm([1.1, 0.3], [0.7, 0.2])),
        None,
        ["n: folding it would cost more precision than the budget of 0"],
        options={"options": bnfuse.Options(budget=0)},
    ),
    Case(
        lambda: Net(
            lambda m, x: m.u(m.n(F.silu(x)) * torch.full((2, 1, 1), float(x.shape[-1]))), u=conv(), n=anything()
        ),
        FORWARD,
        ["n: forward: full in Net: its contents depend on the size of the input"],
    ),
    Case(
        lambda: Net(
            lambda m, x: F.conv2d(m.n(F.silu(x)), m.l(x.mean((0, 2, 3))).view(2, 2, 1, 1)),
            l=nn.Linear(2, 4),
            n=anything(),
        ),
        FORWARD,
        ["n: forward: its contents depend on the run"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


def test_a_wrong_reason_is_found() -> None:
    case = Case(CASES[0].make, BACKWARD, ["n: backward: cumsum in Net: something else"])
    with pytest.raises(AssertionError, match="something else"):
        check(case)
