"""Parallel layer: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from rule_cases import BESIDE, Case, Net, anything, check, conv, image


def large_variance():
    large = anything()
    large.running_var *= 1000000000000.0
    return Net(lambda m, x: F.relu(m.u(y := F.relu(x)) + m.n(y)), u=conv(), n=large)


CASES = [
    Case(
        lambda: Net(
            lambda m, x: F.relu(m.u(y := F.relu(x)) + m.n(y)), u=conv(size=4, padding="same", dilation=2), n=anything()
        ),
        BESIDE,
        ["n: beside: conv2d in u (Conv2d): no tap of its kernel reads the position that it writes to"],
    ),
    Case(
        lambda: Net(lambda m, x: F.relu(m.u(y := F.relu(x)) + m.n(y)), u=conv(stride=2), n=anything()),
        BESIDE,
        ["n: beside: conv2d in u (Conv2d): it skips positions of its input"],
        inputs=lambda: (image()[..., :1, :1],),
    ),
    Case(
        lambda: Net(lambda m, x: F.relu(F.conv2d((y := F.relu(x)), 2 * m.u.weight) + m.n(y)), u=conv(), n=anything()),
        BESIDE,
        ["n: beside: conv2d in Net: its weight is no parameter of its own, so single entries of it cannot change"],
    ),
    Case(
        large_variance,
        BESIDE,
        ["n: beside: conv2d in u (Conv2d): it would have to add much more than the norm gives, which costs precision"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
