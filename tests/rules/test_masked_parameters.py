"""Parameters that the forward multiplies by a mask in place: norms that go into them, and norms that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Removal, anything, check, check_goes, shift_alone
from support import prepared
from torch import Tensor, nn

import bnfuse


class Masked(nn.Conv2d):
    """A convolution whose forward changes its weight first."""

    def __init__(self, change: Callable[[Any], None], saved: bool = True, **options: Any) -> None:
        super().__init__(2, 2, 3, padding=1, **options)
        self.change = change
        mask = torch.ones(2, 2, 3, 3)
        mask[:, :, 1, 2:], mask[:, :, 2] = 0, 0
        self.register_buffer("mask", mask, persistent=saved)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return super().forward(x)


def assigned(layer: Any) -> None:
    layer.weight.data *= layer.mask


def in_place(layer: Any) -> None:
    layer.weight.data.mul_(layer.mask)


def without_gradient(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(layer.mask)


def new_memory(layer: Any) -> None:
    layer.weight.data = layer.weight.data * layer.mask


def new_memory_twice(layer: Any) -> None:
    layer.weight.data = layer.mask * layer.weight.data
    layer.weight.data *= layer.mask


CHANGES = [assigned, in_place, without_gradient, new_memory, new_memory_twice]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"saved": False}])
@pytest.mark.parametrize("change", CHANGES)
def test_norm_goes(change: Callable[[Any], None], options: dict[str, Any]) -> None:
    def before() -> nn.Module:
        return Net(lambda m, x: m.n(m.u(x)), u=Masked(change, **options), n=nn.BatchNorm2d(2))

    def after() -> nn.Module:
        return Net(lambda m, x: m.u(m.n(F.silu(x))), u=Masked(change, **options), n=nn.BatchNorm2d(2))

    def twice() -> nn.Module:
        return Net(lambda m, x: m.n(m.u(x)) - m.n(m.u(x.square())), u=Masked(change, **options), n=nn.BatchNorm2d(2))

    for dead in (0.0, 0.6):
        check_goes(Removal(before, ("u",), dead=dead))
        check_goes(Removal(twice, ("u",), dead=dead))
        check_goes(Removal(after, ("u",), dead=dead, shiftless=True))


@pytest.mark.parametrize("change", CHANGES)
def test_every_later_call_is_right_too(change: Callable[[Any], None]) -> None:
    model = prepared(Net(lambda m, x: m.n(m.u(x)), u=Masked(change), n=nn.BatchNorm2d(2)))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    fused = bnfuse.fuse(model, x)
    assert isinstance(fused.n, nn.Identity)
    for _ in range(3):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def halved(layer: Any) -> None:
    layer.weight.data *= 0.5


def scaled_mask(layer: Any) -> None:
    layer.weight.data *= layer.mask * 2


def clipped(layer: Any) -> None:
    layer.weight.data.clamp_(-0.1, 0.1)


def squared(layer: Any) -> None:
    layer.weight.data = layer.weight.data * layer.weight.data


def moved(layer: Any) -> None:
    layer.weight.data = layer.weight.data + layer.mask


def masked_and_read(layer: Any) -> None:
    layer.weight.data *= layer.mask
    layer.norm_of_weight = layer.weight.data.square().sum()


def nothing(layer: Any) -> None:
    pass


class MaskedLater(Masked):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.weight.data *= self.mask
        return y


class Unpadded(Masked):
    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__(change)
        self.padding = (0, 0)


class MaskedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.bias.data *= self.mask
        return x + self.bias[:, None, None]


def stays(change: Callable[[Any], None], reason: str) -> Case:
    return Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=Masked(change), n=anything()), BACKWARD, [f"n: backward: {reason}"]
    )


CASES = [
    stays(halved, "mul in u (Masked): its output cannot change units: it is written to during the run"),
    stays(scaled_mask, "mul in u (Masked): its output cannot change units: it is written to during the run"),
    stays(clipped, "clamp in u (Masked): its output cannot change units: it is written to during the run"),
    stays(squared, "u.weight cannot change: its contents leave PyTorch by .data"),
    stays(moved, "u.weight cannot change: its contents leave PyTorch by .data"),
    stays(masked_and_read, "pow in u (Masked): no scale or shift passes through it"),
    Case(
        lambda: Net(lambda m, x: m.n(m.b(F.silu(x))), b=MaskedBias(), n=shift_alone()),
        BACKWARD,
        ["n: backward: silu in Net: no scale or shift passes through it"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x))), u=Unpadded(assigned), n=anything()),
        FORWARD,
        ["n: forward: mul in u (Unpadded): its contents depend on the size of the input"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


def test_a_mask_for_the_next_call_is_seen() -> None:
    check_goes(
        Removal(lambda: Net(lambda m, x: m.n(m.u(x)), u=MaskedLater(nothing), n=nn.BatchNorm2d(2)), ("u",), dead=0.6)
    )
