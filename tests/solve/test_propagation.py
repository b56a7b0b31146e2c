"""Propagation: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, conv, no_shift, parameter, shift_alone

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)) + m.u(x.flip(3)), u=conv(), n=anything()),
        BACKWARD,
        [
            "n: backward: conv2d in u (Conv2d): u.weight is used more than once, and not every use asks for the same edit: see conv2d in u (Conv2d)"
        ],
    ),
    Case(
        lambda: Net(lambda m, x: m.v(m.n(y := m.u(x)) + y), u=conv(), v=conv(), n=anything()),
        FORWARD,
        ["n: forward: add in Net: its operands would get different scales"],
    ),
    Case(
        lambda: Net(lambda m, x: F.silu(m.n(y := m.u(x)) * y.flip(3)), u=conv(), n=no_shift()),
        FORWARD,
        ["n: forward: flip in Net: its output cannot change units: it would need two different units at once"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.n(m.u(x))), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: n: it is applied to its own output"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.n(m.u(x)) + m.n(m.v(x))), u=conv(), v=conv(), n=shift_alone()),
        BACKWARD,
        ["n: backward: add in Net: the shifts of its operands do not add up"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.n(m.u(x)) * m.n(m.v(x))), u=conv(), v=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: mul in Net: the scales of its factors and its result do not fit"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.n(m.u(x)) * m.gain.p), u=conv(), gain=parameter([[[2.0]], [[4.0]]]), n=anything()
        ),
        BACKWARD,
        ["n: backward: mul in Net: the shifts of its input and output do not fit"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.pad(m.n(m.u(x)), (1, 1, 1, 1))), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: pad in Net: its input and output would get different units"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
