"""Aliasing: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, conv

CASES = [
    Case(
        lambda: Net(lambda m, x: m.e((s := m.u(x)) + m.v(m.n(s).relu_())), u=conv(), v=conv(), e=conv(), n=anything()),
        BACKWARD,
        ["n: backward: relu in Net: without the norm it would overwrite in place what add in Net still reads"],
    ),
    Case(
        lambda: Net(lambda m, x: (m.u(m.n(x).neg_()), x), u=conv(), n=anything()),
        FORWARD,
        ["n: forward: neg in Net: without the norm it would overwrite in place what the caller still reads"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)[:, ::2]).view(-1, 32), u=conv(2, 4), n=anything()),
        BACKWARD,
        [
            "n: backward: view in Net: without the norm it would get a tensor with another layout in memory, which makes a difference to it"
        ],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
