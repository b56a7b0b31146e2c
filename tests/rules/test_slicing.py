"""Slicing: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, check_removed, conv

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)[:, [0, 0]]), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: index in Net: it takes an element more than once"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)[:, [0, 1], [0, 1]].unsqueeze(3)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: index in Net: the units vary along an axis whose places a tensor tells"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x))[:, torch.tensor([True, True])]), u=conv(), n=anything()),
        FORWARD,
        ["n: forward: index in Net: the units vary along an axis whose places a tensor tells"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x).narrow(1, torch.tensor(0), 2)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: narrow in Net: its start is a tensor"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(torch.cat(m.u(x).chunk(2, 1)[::-1], 1)), BACKWARD),
    (lambda m, x: m.v(m.n(F.silu(m.u(x)))[:, :, 1:]), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
