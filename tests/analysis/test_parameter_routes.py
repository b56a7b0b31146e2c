"""Biases that are created in subclasses of PyTorch's layers, some of which do something of their own with a bias."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import fused_and_checked, prepared
from torch import Tensor, nn


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class DoubledBias(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super()._conv_forward(input, weight, None)
        return y if bias is None else y + 2 * bias.view(-1, 1, 1)


class PositiveBias(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, None if bias is None else bias.abs())


class BiasUnread(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, None, self.stride, self.padding)


class OwnPadding(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="replicate"), weight, bias)


class Direct(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 2, self.bias)


class Named(nn.Conv2d):
    """It adds what the forward does not call."""

    def extra_repr(self) -> str:
        return "named"

    def describe(self) -> str:
        return repr(self)


def on_the_object(inputs: int, outputs: int, size: int, **options: Any) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, size, **options)

    def own(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, None if bias is None else bias.abs())

    layer._conv_forward = types.MethodType(own, layer)
    return layer


@pytest.mark.parametrize("kind", [Standardised, OwnPadding, Direct, Named])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_that_is_handed_on_takes_up_the_shift(kind: Any, bias: bool) -> None:
    model = prepared(nn.Sequential(kind(2, 4, 3, bias=bias), nn.BatchNorm2d(4)), dead=0.3)
    plan, fused = fused_and_checked(model, torch.randn(2, 2, 8, 8, dtype=torch.float64))
    assert plan.fused[0].into == ("0",)
    assert fused[0].bias is not None  # type: ignore[index]


@pytest.mark.parametrize("kind", [DoubledBias, PositiveBias, BiasUnread, on_the_object])
def test_a_bias_that_would_be_read_in_another_way_is_not_created(kind: Any) -> None:
    model = prepared(nn.Sequential(kind(2, 4, 3, bias=False), nn.BatchNorm2d(4)), dead=0.3)
    plan, fused = fused_and_checked(model, torch.randn(2, 2, 8, 8, dtype=torch.float64))
    assert not plan.fused
    assert fused[0]._parameters["bias"] is None  # type: ignore[index]


@pytest.mark.parametrize("kind", [OwnPadding, Direct, Named])
def test_a_created_bias_is_no_number_that_follows_the_size(kind: Any) -> None:
    model = prepared(nn.Sequential(nn.BatchNorm2d(2), kind(2, 4, 3, bias=False), nn.Sigmoid()), dead=0.3)
    plan, _ = fused_and_checked(model, torch.randn(2, 2, 8, 8, dtype=torch.float64))
    assert plan.fused[0].into == ("1",)
