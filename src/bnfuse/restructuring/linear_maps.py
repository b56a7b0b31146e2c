r"""Linear maps of images or vectors that a single layer can do: their sums, their sequences, and that layer.

A convolution over some axes gives, at the place ``o``,

    y[o] = b + sum over k of w[k] @ x[stride*o + first + step*k],       x = 0 outside of the image,

where ``first`` is the place of its first tap (minus the padding before the image) and ``step`` its dilation. How many
places there are follows from ``excess = padding before + padding behind - step*(taps - 1)``:

    places = floor((size + excess - 1) / stride) + 1.

So everything that shifts, scales, mixes channels, pools with zeros counted, or leaves places out is such a map, and an
identity is one with a single tap. A linear layer is one without axes.

**Sums.** Two maps of one tensor with the same stride and the same excess, and as many channels, are one map: its taps
are those of both on a common grid, and its groups the common divisor of theirs.

**Sequences.** The second map reads ``stride1*(stride2*o + first2 + step2*k2) + first1 + step1*k1``, so the taps are all
sums, the strides multiply, and ``excess = excess1 + stride1*excess2``. Where the second one reads places outside of
what the first has made, these are 0, and have to be what the first map would make there: this is so where the second
pads nothing, and where the first has one tap over each place (``first1 = excess1 = 0``) and no bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


class NotOneLayerError(Exception):
    """No single layer does this; the text says why."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A convolution, or a linear layer if it has no axes.

    Attributes:
        weight: (out, in/groups, \\*taps).
        bias: (out), None for none.
        groups: of the channels.
        stride, first, step, excess: for each axis, see above.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, ...]
    first: tuple[int, ...]
    step: tuple[int, ...]
    excess: tuple[int, ...]

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def channels_in(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def channels_out(self) -> int:
        return self.weight.shape[0]

    @property
    def span(self) -> tuple[int, ...]:
        """From the first tap to the last."""
        return tuple(step * (taps - 1) for step, taps in zip(self.step, self.taps, strict=True))

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Before and behind the image, for each axis; below 0 where places are left out."""
        axes = zip(self.first, self.excess, self.span, strict=True)
        return tuple((-first, excess + span + first) for first, excess, span in axes)

    @property
    def products(self) -> int:
        """Multiplications for one place of the result, of all channels."""
        return self.weight.numel()

    def in_groups(self, groups: int) -> Tensor:
        """The weight with fewer groups, zeros between the channels of different ones.

        >>> identity(2, 0).in_groups(1)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
        """
        if groups == self.groups:
            return self.weight
        parts = self.groups // groups
        if self.weight.is_meta:
            return _shape(self.weight.shape[0], self.weight.shape[1] * parts, *self.taps)
        out, inside = self.weight.shape[0] // self.groups, self.weight.shape[1]
        # (groups, parts, out, in, *taps) -> (groups, parts, out, parts, in, *taps), on the diagonal of the parts
        pieces = self.weight.reshape(groups, parts, out, inside, *self.taps)
        wide = pieces.new_zeros(groups, parts, out, parts, inside, *self.taps)
        for part in range(parts):
            wide[:, part, :, part] = pieces[:, part]
        return wide.reshape(self.weight.shape[0], parts * inside, *self.taps)

    def scaled(self, scale: Tensor | float) -> LinearMap:
        """The map, and then a factor of each channel.

        Args:
            scale: (out), or a number.
        """
        if self.weight.is_meta:
            return self
        factor = scale.reshape(-1, *[1] * (self.weight.dim() - 1)) if isinstance(scale, Tensor) else scale
        return replace(self, weight=self.weight * factor, bias=None if self.bias is None else self.bias * scale)

    def shifted(self, shift: Tensor | float) -> LinearMap:
        """The map, and then a number added to each channel.

        Args:
            shift: (out), or a number.
        """
        if self.weight.is_meta:
            return replace(self, bias=_shape(self.channels_out))
        before = self.weight.new_zeros(self.channels_out) if self.bias is None else self.bias
        return replace(self, bias=before + shift)

    def then(self, after: LinearMap) -> LinearMap:
        """This map and another one after it.

        Raises:
            NotOneLayerError: the other pads what is not 0.
        """
        if self.channels_out != after.channels_in:
            raise NotOneLayerError("the channels do not fit")
        padded = [any(sides) for sides in after.padding]
        if any(min(sides) < 0 for sides in after.padding):
            raise NotOneLayerError("it leaves out the border of the image")
        for axis, is_padded in enumerate(padded):
            if is_padded and (self.taps[axis] != 1 or self.first[axis] or self.excess[axis]):
                raise NotOneLayerError("the border of a tensor is padded that is not 0 there")
        if any(padded) and self.bias is not None and (self.bias.is_meta or bool(self.bias.any())):
            raise NotOneLayerError("a tensor with a bias is padded with zeros")
        if self._scales_channels:
            return self._scaling(after, any(padded))
        groups = math.gcd(self.groups, after.groups)
        far = tuple(stride * step for stride, step in zip(self.stride, after.step, strict=True))
        step = tuple(
            math.gcd(*([own] if count > 1 else []), *([other] if its > 1 else [])) or 1
            for own, count, other, its in zip(self.step, self.taps, far, after.taps, strict=True)
        )
        taps = tuple(
            (own * (count - 1) + other * (its - 1)) // grid + 1
            for own, count, other, its, grid in zip(self.step, self.taps, far, after.taps, step, strict=True)
        )
        inner, outer = self.in_groups(groups), after.in_groups(groups)
        return LinearMap(
            weight=self._weight_then(inner, outer, groups, far, step, taps),
            bias=self._bias_then(outer, after, groups, any(padded)),
            groups=groups,
            stride=tuple(a * b for a, b in zip(self.stride, after.stride, strict=True)),
            first=tuple(a + s * b for a, s, b in zip(self.first, self.stride, after.first, strict=True)),
            step=step,
            excess=tuple(a + s * b for a, s, b in zip(self.excess, self.stride, after.excess, strict=True)),
        )

    def _weight_then(
        self,
        inner: Tensor,
        outer: Tensor,
        groups: int,
        far: tuple[int, ...],
        step: tuple[int, ...],
        taps: tuple[int, ...],
    ) -> Tensor:
        """The weight of this map and another one.

        Args:
            inner, outer: the weights of both, of as many groups.
            far: from one tap of the other to the next, in places of the image.
            step, taps: of the result.
        """
        if inner.is_meta:
            return _shape(outer.shape[0], inner.shape[1], *taps)
        inner = inner.reshape(groups, -1, *inner.shape[1:])  # (groups, middle, in, *taps)
        outer = outer.reshape(groups, -1, *outer.shape[1:])  # (groups, out, middle, *taps)
        weight = inner.new_zeros(groups, outer.shape[1], inner.shape[2], *taps)
        own = [
            slice(0, pace * (count - 1) // grid + 1, max(pace // grid, 1))
            for pace, count, grid in zip(self.step, self.taps, step, strict=True)
        ]
        for tap in itertools.product(*map(range, outer.shape[3:])):
            moved = (
                slice(part.start + reach * place // grid, part.stop + reach * place // grid, part.step)
                for part, reach, place, grid in zip(own, far, tap, step, strict=True)
            )
            here: tuple[Any, ...] = (..., *tap)
            there: tuple[Any, ...] = (..., *moved)
            weight[there] += torch.einsum("gom,gmi...->goi...", outer[here], inner)
        return weight.flatten(0, 1)

    def _bias_then(self, outer: Tensor, after: LinearMap, groups: int, padded: bool) -> Tensor | None:
        """The bias of this map and another one; what this one adds meets no padding, or is 0."""
        if self.bias is None or padded:
            return after.bias
        if outer.is_meta:
            return _shape(after.channels_out)
        outer = outer.reshape(groups, -1, *outer.shape[1:])  # (groups, out, middle, *taps)
        summed = outer.flatten(3).sum(3) if outer.dim() > 3 else outer
        carried = torch.einsum("gom,gm->go", summed, self.bias.reshape(groups, -1)).flatten()
        return carried if after.bias is None else after.bias + carried

    @property
    def _scales_channels(self) -> bool:
        """Whether it does nothing but a factor and a shift of each channel."""
        alone = self.groups == self.channels_in == self.channels_out and self.products == self.channels_in
        return alone and not any(self.first) and not any(self.excess) and all(each == 1 for each in self.stride)

    def _scaling(self, after: LinearMap, padded: bool) -> LinearMap:
        """Another map after this one, which scales channels; the same as in general, but quick."""
        bias = self._bias_then(after.weight, after, after.groups, padded)
        if after.weight.is_meta:
            return replace(after, bias=bias)
        scale = self.weight.reshape(after.groups, -1)  # (groups, in), as the inputs of each group
        each = after.weight.reshape(after.groups, -1, *after.weight.shape[1:])  # (groups, out, in, *taps)
        weight = each * scale.reshape(after.groups, 1, -1, *[1] * len(after.taps))
        return replace(after, weight=weight.flatten(0, 1), bias=bias)

    def with_padding_of_a_layer(self) -> LinearMap:
        """The same map, with taps of 0 where a layer pads more than this map, since it pads both sides alike."""
        low, high, step = [], [], []
        for (before, behind), own, taps in zip(self.padding, self.step, self.taps, strict=True):
            wanted = max(before, behind, 0)
            low.append(wanted - before)
            high.append(wanted - behind)
            step.append(math.gcd(own if taps > 1 else 0, low[-1], high[-1]) or 1)
        if not any(low) and not any(high):
            return self
        first = tuple(place - more for place, more in zip(self.first, low, strict=True))
        span = tuple(map(sum, zip(self.span, low, high, strict=True)))
        grid = _Grid(first, tuple(step), tuple(reach // each + 1 for reach, each in zip(span, step, strict=True)))
        return replace(self, weight=grid.placed(self.weight, self), first=first, step=tuple(step))


@dataclass(frozen=True)
class _Grid:
    """Places of taps, for each axis."""

    first: tuple[int, ...]
    step: tuple[int, ...]
    taps: tuple[int, ...]

    def placed(self, weight: Tensor, of: LinearMap) -> Tensor:
        """A weight with the taps of a map, on this grid."""
        if weight.is_meta:
            return _shape(*weight.shape[:2], *self.taps)
        wide = weight.new_zeros(*weight.shape[:2], *self.taps)
        parts: list[Any] = [...]
        for first, step, own_first, own_step, count in zip(
            self.first, self.step, of.first, of.step, of.taps, strict=True
        ):
            start, pace = (own_first - first) // step, max(own_step // step, 1) if count > 1 else 1
            parts.append(slice(start, start + pace * (count - 1) + 1, pace))
        wide[tuple(parts)] = weight
        return wide


def _shape(*sizes: int) -> Tensor:
    """A tensor without contents, for a map of which only the shape is asked."""
    return torch.empty(sizes, dtype=torch.float64, device="meta")


def identity(channels: int, axes: int, shape_only: bool = False) -> LinearMap:
    """The map that changes nothing.

    Args:
        shape_only: without numbers.
    """
    shape = (channels, *[1] * (axes + 1))
    ones = _shape(*shape) if shape_only else torch.ones(shape, dtype=torch.float64, device="cpu")
    none = (0,) * axes
    return LinearMap(ones, None, channels, (1,) * axes, none, (1,) * axes, none)


def total(maps: Sequence[LinearMap]) -> LinearMap:
    """The sum of several maps of one tensor.

    Raises:
        NotOneLayerError: they have another stride, or give another size at some size of the image.
    """
    one = maps[0]
    for other in maps[1:]:
        if other.stride != one.stride or other.excess != one.excess:
            raise NotOneLayerError("its terms have different strides, or sizes that follow from the image differently")
        if (other.channels_in, other.channels_out) != (one.channels_in, one.channels_out):
            raise NotOneLayerError("a term is the same for all channels")
    groups = math.gcd(*(each.groups for each in maps))
    first = tuple(map(min, zip(*(each.first for each in maps), strict=True)))
    ends = [tuple(a + b for a, b in zip(each.first, each.span, strict=True)) for each in maps]
    last = tuple(map(max, zip(*ends, strict=True)))
    step = tuple(
        math.gcd(
            *(each.first[axis] - first[axis] for each in maps),
            *(each.step[axis] for each in maps if each.taps[axis] > 1),
        )
        or 1
        for axis in range(len(first))
    )
    taps = tuple((b - a) // s + 1 for a, b, s in zip(first, last, step, strict=True))
    grid = _Grid(first, step, taps)
    weight, bias = grid.placed(one.in_groups(groups), one), one.bias
    if weight.is_meta:
        bias = next((each.bias for each in maps if each.bias is not None), None)
        return LinearMap(weight, bias, groups, one.stride, first, step, one.excess)
    for other in maps[1:]:
        weight = weight + grid.placed(other.in_groups(groups), other)
        if other.bias is not None:
            bias = other.bias if bias is None else bias + other.bias
    return LinearMap(weight, bias, groups, one.stride, first, step, one.excess)
