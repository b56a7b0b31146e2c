"""Sums and sequences of random convolutions are one convolution, at every size that they take."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnfuse.restructuring.linear_maps import LinearMap, NotOneLayerError, identity, total

KINDS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
SIZES = (7, 9, 12)
Function = Callable[[Tensor], Tensor]


def drawn(
    choose: random.Random, inputs: int, outputs: int, axes: int, like: LinearMap | None = None
) -> tuple[LinearMap, Function]:
    """A map and the convolution that it is; one that can be added to another, if that is given."""
    groups = choose.choice([each for each in (1, 2, 3, 4) if not inputs % each and not outputs % each])
    taps = [choose.choice((1, 2, 3)) for _ in range(axes)]
    step = [choose.choice((1, 2)) for _ in range(axes)]
    padding = [choose.choice((0, 0, 1, 2)) for _ in range(axes)]
    stride = tuple(choose.choice((1, 1, 2, 3)) for _ in range(axes)) if like is None else like.stride
    if like is not None:  # the same excess
        taps = [1 + 2 * choose.choice((0, 1)) for _ in range(axes)]
        padding = [
            (excess + pace * (count - 1)) // 2 for excess, pace, count in zip(like.excess, step, taps, strict=True)
        ]
    weight = torch.randn(outputs, inputs // groups, *taps, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64) if choose.random() < 0.5 else None
    excess = tuple(2 * sides - pace * (count - 1) for sides, pace, count in zip(padding, step, taps, strict=True))
    made = LinearMap(weight, bias, groups, stride, tuple(-sides for sides in padding), tuple(step), excess)
    return made, lambda x: KINDS[axes][1](x, weight, bias, stride, tuple(padding), tuple(step), groups)


def layer(made: LinearMap) -> nn.Module:
    """The layer that does a map."""
    made = made.with_padding_of_a_layer()
    assert all(before == behind >= 0 for before, behind in made.padding)
    padding = tuple(before for before, _ in made.padding)
    convolution = KINDS[len(made.taps)][0](
        made.channels_in, made.channels_out, made.taps, made.stride, padding, made.step, made.groups,
        bias=made.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    convolution.weight.data = made.weight
    if made.bias is not None:
        convolution.bias.data = made.bias
    return convolution.requires_grad_(False)


def compare(made: LinearMap, function: Function, channels: int) -> int:
    """At how many sizes a map and a function were the same."""
    compared = 0
    for size in SIZES:
        x = torch.randn(2, channels, *[size] * len(made.taps), dtype=torch.float64)
        try:
            expected = function(x)
        except RuntimeError:  # it does not take so small an image
            continue
        torch.testing.assert_close(layer(made)(x), expected, rtol=1e-12, atol=1e-12)
        compared += 1
    return compared


def shape(made: LinearMap) -> LinearMap:
    """The map without numbers."""
    bias = None if made.bias is None else made.bias.to("meta")
    return LinearMap(made.weight.to("meta"), bias, made.groups, made.stride, made.first, made.step, made.excess)


def assert_same_shape(one: LinearMap, other: LinearMap) -> None:
    assert one.weight.shape == other.weight.shape
    for name in ("groups", "stride", "first", "step", "excess"):
        assert getattr(one, name) == getattr(other, name), name


def test_sequences() -> None:
    compared = refused = 0
    for seed in range(300):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        axes, channels = choose.choice((1, 2, 2, 3)), choose.choice((2, 4, 6))
        first, does_first = drawn(choose, channels, choose.choice((2, 4, 6)), axes)
        second, does_second = drawn(choose, first.channels_out, 6, axes)
        try:
            made = first.then(second)
        except NotOneLayerError:
            refused += 1
            continue
        compared += compare(made, lambda x: does_second(does_first(x)), channels)  # noqa: B023
        if not (any(map(any, second.padding)) and first.bias is not None):
            assert_same_shape(shape(first).then(shape(second)), made)
    assert compared > 150
    assert refused > 50


def test_sums() -> None:
    compared = 0
    for seed in range(200):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        axes, channels = choose.choice((1, 2, 2, 3)), choose.choice((2, 4, 6))
        one, does_one = drawn(choose, channels, channels, axes)
        other, does_other = drawn(choose, channels, channels, axes, one)
        if any(before < 0 for before, _ in other.padding) or other.excess != one.excess:
            continue
        made = total([one, other.scaled(-2.0).shifted(0.5)])
        compared += compare(made, lambda x: does_one(x) - 2 * does_other(x) + 0.5, channels)  # noqa: B023
        assert_same_shape(total([shape(one), shape(other)]), made)
    assert compared > 100


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_identity(axes: int) -> None:
    made, function = drawn(random.Random(axes), 4, 4, axes)
    assert compare(identity(4, axes).then(made), function, 4)
    shifted = identity(4, axes).scaled(torch.tensor([1.0, -2.0, 0.0, 3.0]).double()).shifted(torch.ones(4).double())
    weight, ones, zeros = torch.randn(4, 4, *[3] * axes, dtype=torch.float64), (1,) * axes, (0,) * axes
    valid = LinearMap(weight, None, 1, ones, zeros, ones, (-2,) * axes)
    gain = torch.tensor([1.0, -2.0, 0.0, 3.0]).double().reshape(4, *ones)
    assert compare(shifted.then(valid), lambda x: KINDS[axes][1](x * gain + 1, weight), 4)
    with pytest.raises(NotOneLayerError, match="padded with zeros"):
        shifted.then(LinearMap(weight, None, 1, ones, (-1,) * axes, ones, zeros))


def test_what_is_no_one_layer() -> None:
    one, two = identity(4, 2), identity(4, 2).then(drawn(random.Random(3), 4, 6, 2)[0])
    strided = LinearMap(one.weight, None, 4, (2, 2), (0, 0), (1, 1), (0, 0))
    with pytest.raises(NotOneLayerError, match="strides"):
        total([one, strided])
    with pytest.raises(NotOneLayerError, match="channels do not fit"):
        two.then(one)
