"""Identity: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, check_removed, conv

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(F.dropout(m.u(x), training=True)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: dropout in Net: it drops elements at random"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(torch.zeros_like(m.u(x))), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: zeros_like in Net: it makes a constant"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(torch.zeros_like(x).index_add(0, torch.arange(2)[: len(x)], m.u(x))),
            u=conv(),
            n=anything(),
        ),
        BACKWARD,
        ["n: backward: zeros_like in Net: it makes a constant"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x)).long().float()), u=conv(), n=anything()),
        FORWARD,
        ["n: forward: to in Net: its output cannot change units: it holds torch.int64"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(m.u(x).clone()), BACKWARD),
    (lambda m, x: m.v(F.dropout(m.n(F.silu(m.u(x))), training=False)), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
