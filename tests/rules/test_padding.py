"""Padding: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, anything, check, check_removed, conv, dead_channel, norm

CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(F.pad(m.u(x), (1, 1, 1, 1))), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: pad in Net: it pads with a number, which would not be shifted"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.pad(m.u(x), (1, 1, 1, 1), value=1.0)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: pad in Net: it pads with 1.0, which cannot be rescaled"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(F.max_pool2d(F.pad(m.u(x), (1, 1, 1, 1), value=float("-inf")), 3)),
            u=conv(),
            n=dead_channel(),
        ),
        BACKWARD,
        ["n: backward: pad in Net: minus infinity stays so under a positive scale only"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(F.pad(m.u(x)[None], (0, 0, 0, 0, 1, 1), mode="replicate")[0]),
            u=conv(),
            n=norm([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]),
        ),
        BACKWARD,
        ["n: backward: pad in Net: the units vary along the axis that it pads"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.n(F.pad(m.u(x), (1, 1, 1, 1), mode="reflect")), BACKWARD),
    (lambda m, x: m.v(F.pad(m.n(F.silu(m.u(x))), (1, 1, 1, 1), mode="replicate")), FORWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)
