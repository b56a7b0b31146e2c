"""Shapes: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, check_removed, conv

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).expand(-1, 2, -1, -1)), u=conv(2, 1), n=anything()),
        BACKWARD,
        ["n: backward: expand in Net: the units differ among the copies that it makes"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).roll(1)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: roll in Net: it rolls the flattened tensor"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)[:, :, :0].reshape(0, 2, 4, 4)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: reshape in Net: it holds no elements"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(m.u(x).transpose(2, 3)), BACKWARD),
    (lambda m, x: m.v(m.n(F.silu(m.u(x))).flatten(2).unsqueeze(3)), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
