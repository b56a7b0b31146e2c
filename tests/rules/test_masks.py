"""Norms between masks: those between two that are surely the same go, and all others stay, with the exact reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, Case, Net, Removal, anything, check, check_goes, conv, image
from torch import Tensor, nn

PUTS_IN = "n: backward: {operator} in Net: it puts in a number that does not change with the units"


def stays(function: Callable[..., Tensor], reason: str) -> Case:
    """A function of the module and the input, and of a mask of one channel."""
    return Case(
        lambda: Net(lambda m, x: function(m, x, x[:, :1] > 0), u=conv(), v=conv(), n=anything()), BACKWARD, [reason]
    )


FILLS = PUTS_IN.format(operator="masked_fill")

CASES = [
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)), FILLS),
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)).masked_fill(x[:, :1] > 0.1, 0), FILLS),
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)).masked_fill(~k, 0), FILLS),
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)) * k, FILLS),
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)).masked_fill(k.transpose(2, 3), 0), FILLS),
    stays(lambda m, x, k: (y := m.n(m.u(x).masked_fill(k, 0))).masked_fill(k, 0) + y.mean(), FILLS),
    stays(lambda m, x, k: F.max_pool2d(m.n(m.u(x).masked_fill(k, 0)), 3, 1, 1).masked_fill(k, 0), FILLS),
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)).abs().log() * ~k, FILLS),
    stays(lambda m, x, k: m.n(m.u(x).masked_fill(k, float("inf"))).masked_fill(k, 0), FILLS),
    stays(
        lambda m, x, k: m.n(torch.where(k, 0, m.u(x))).where(k, torch.zeros_like(x)), PUTS_IN.format(operator="where")
    ),
    stays(
        lambda m, x, k: m.n(m.u(x) * (w := torch.where(k, 0.5, 1.0).to(x))) * w,
        "n: backward: mul in Net: no shift passes through a gate",
    ),
    stays(
        lambda m, x, k: m.n(m.u(x) * (w := 2 - k.to(x))) * w,
        "n: backward: mul in Net: no shift passes through a gate",
    ),
    stays(
        lambda m, x, k: m.n(m.u(x).index_put((x > 0,), torch.tensor(0.0))),
        "n: backward: index_put in Net: no scale or shift passes through it",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


def test_a_mask_of_other_numbers_than_zeros_and_ones() -> None:
    check(
        Case(
            lambda: Net(lambda m, x, k: m.n(m.u(x) * k) * k, u=conv(), n=anything()),
            BACKWARD,
            ["n: backward: mul in Net: no shift passes through a gate"],
            inputs=lambda: (image(), (image() > 0).float()),
        )
    )


def test_random_masks_differ() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        first, second = (torch.rand(x.shape) > 0.5 for _ in range(2))
        return m.n(m.u(x).masked_fill(first, 0)).masked_fill(second, 0)

    check(Case(lambda: Net(function, u=conv(), n=anything()), BACKWARD, [FILLS]))


def assigned(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.u(x)
    y[mask] = 3
    y = F.silu(m.n(y))
    y[mask] = 0
    return y


def shorter_than(lengths: Tensor, size: int) -> Tensor:
    return (torch.arange(size) < lengths[:, None])[:, None, None, :]


REMOVED: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    lambda m, x, k: m.n(m.u(x).masked_fill(k, 0)).masked_fill(k, 0),
    lambda m, x, k: m.n(m.u(x).masked_fill(k, 3)).masked_fill(k, -1),
    lambda m, x, k: m.n(m.u(x).masked_fill_(k, 0)).masked_fill_(k, 0),
    lambda m, x, k: m.n(m.u(x).masked_fill(x > 0, 0)).masked_fill(x > 0, 0),
    lambda m, x, k: F.dropout(F.gelu(m.n(m.u(x).masked_fill(k, 0))), 0.1, False).masked_fill(k, 0),
    lambda m, x, k: (m.n(m.u(x).masked_fill(k, 0)) + m.v(x)).masked_fill(k, 0),
    lambda m, x, k: torch.where(k, 0, m.n(torch.where(k, 0.0, m.u(x)))),
    lambda m, x, k: torch.where(~k, m.n(torch.where(k, torch.zeros_like(x), m.u(x))), 1),
    lambda m, x, k: m.n(m.u(x) * (w := k.to(x))) * w,
    lambda m, x, k: m.n(k * m.u(x)) * k.double(),
    lambda m, x, k: m.n(m.u(x) * (1 - k.to(x))).masked_fill(k, 0),
    lambda m, x, k: m.n(m.u(x).masked_fill(k.double() == 0, 0)) * k,
    lambda m, x, k: m.n(m.u(x).masked_fill(~k.squeeze(1).unsqueeze(1), 0)) * k.squeeze(1).to(x).unsqueeze(1),
    lambda m, x, k: m.n(m.u(x).masked_fill(k.expand_as(x), 0)) * ~k,
    lambda m, x, k: assigned(m, x, x > 0),
    lambda m, x, k: assigned(m, x, k.expand_as(x)),
    lambda m, x, k: assigned(m, x, (x > 0)[..., 0]),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("function", REMOVED)
def test_norm_goes(function: Callable[[Any, Tensor, Tensor], Tensor], dead: float) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.w(function(m, x, x[:, :1] > 0))

    check_goes(
        Removal(
            lambda: Net(forward, u=conv(), v=conv(), w=conv(size=3, padding=1), n=nn.BatchNorm2d(2)),
            ("u",),
            dead=dead,
        )
    )


def test_norm_goes_between_masks_of_lengths() -> None:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        mask = shorter_than(lengths, x.shape[-1])
        return F.relu(m.n(m.u(x) * mask.to(x))) * mask

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([2])

    check_goes(Removal(lambda: Net(forward, u=conv(), n=nn.BatchNorm2d(2)), ("u",), inputs))


def test_masks_that_are_the_same_for_one_size_or_one_input() -> None:
    def by_size(m: Any, x: Tensor) -> Tensor:
        first, second = (torch.arange(4)[-size:] < 3 for size in x.shape[2:])
        return m.n(m.u(x).masked_fill(first, 0)).masked_fill(second, 0)

    def by_contents(m: Any, x: Tensor, numbers: Tensor) -> Tensor:
        return m.n(m.u(x).masked_fill(x > numbers.min().item(), 0)).masked_fill(x > numbers.max().item(), 0)

    def inputs() -> tuple[Tensor, Tensor]:
        return image(), torch.tensor([0.5])

    check(Case(lambda: Net(by_size, u=conv(), n=anything()), BACKWARD, [FILLS]))
    check(Case(lambda: Net(by_contents, u=conv(), n=anything()), BACKWARD, [FILLS], inputs))
