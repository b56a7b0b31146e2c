"""Indexing: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, check, check_removed, conv, no_shift, shift_alone

CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.u(torch.zeros_like(x).index_add(0, torch.arange(2)[: len(x)], m.n(F.silu(x)))),
            u=conv(),
            n=shift_alone(),
        ),
        FORWARD,
        ["n: forward: index_add in Net: it takes no shift: an element may be added any number of times"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.u(x).scatter(0, torch.arange(2)[:1].view(1, 1, 1, 1), 2.0, reduce="add")),
            u=conv(),
            n=no_shift(),
        ),
        BACKWARD,
        ["n: backward: scatter in Net: it adds a number"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.u(x).scatter(0, torch.arange(2)[:1].view(1, 1, 1, 1), x, reduce="multiply")),
            u=conv(),
            n=no_shift(),
        ),
        BACKWARD,
        ["n: backward: scatter in Net: it multiplies"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(m.u(x)[:, [1, 0]]), BACKWARD),
    (lambda m, x: m.v(m.n(F.silu(m.u(x)))[:, [1, 0]]), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
