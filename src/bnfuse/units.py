"""The algebra of units: a per-channel scale and shift of a tensor.

A change of units relates the tensor that the model has now (*old*) to the tensor that the fused model will have
in its place (*new*). It is kept in the direction in which it arose, because a scale of exactly 0 (a dead channel)
has one direction only:

* direct:   ``new = scale * old + shift``   (a norm folded into what comes before it),
* inverse:  ``old = scale * new + shift``   (a norm folded into what comes after it).

Either is turned into the other by ``scale -> 1/scale``, ``shift -> -shift/scale``, which is refused outside a safe
range. Linear maps of tensors (reshapes, means, concatenations) act on scale and shift alike in both directions.

Scale and shift are float64 tensors with as many axes as the tensor that they belong to, each axis either full or of
size 1, so that they broadcast. ``None`` stands for 1 (scale) and 0 (shift).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAFE_SCALE = 1e8
"""A scale is inverted only where its magnitude lies within [1/SAFE_SCALE, SAFE_SCALE]."""

_EQUAL = 1e-10


class NotInvertibleError(Exception):
    """A scale is 0, or too close to 0 or infinity, to be inverted."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Numbers that are added to single entries of a tensor.

    Attributes:
        places: for each axis of the tensor, the index of each entry, int64 (n,).
        values: float64 (n,).
    """

    places: tuple[Tensor, ...]
    values: Tensor

    def scaled(self, scale: Tensor | None) -> Entries:
        """The entries times a scale that broadcasts against the tensor."""
        if scale is None:
            return self
        sizes = (1,) * (len(self.places) - scale.dim()) + tuple(scale.shape)
        at = tuple(
            torch.zeros_like(place) if size == 1 else place for place, size in zip(self.places, sizes, strict=True)
        )
        return Entries(self.places, self.values * scale.reshape(sizes)[at])

    def joined(self, other: Entries) -> Entries:
        """Both; where they meet, their sum is added."""
        places = tuple(torch.cat(pair) for pair in zip(self.places, other.places, strict=True))
        return Entries(places, torch.cat([self.values, other.values]))

    def rows(self, start: int, size: int) -> Entries:
        """Those in a part of the first axis, as entries of this part."""
        here = (self.places[0] >= start) & (self.places[0] < start + size)
        first, *others = (place[here] for place in self.places)
        return Entries((first - start, *others), self.values[here])

    def add_to(self, tensor: Tensor) -> Tensor:
        """Add them in place."""
        return tensor.index_put_(self.places, self.values.to(tensor.dtype), accumulate=True)

    def same_as(self, other: Entries) -> bool:
        """Equal up to the rounding of float64."""
        there = len(self.places) == len(other.places)
        alike = there and all(torch.equal(a, b) for a, b in zip(self.places, other.places, strict=True))
        return alike and _close(self.values, other.values, 0.0)


@dataclass(eq=False, slots=True)  # not frozen, since thousands are made; nothing writes to one
class Unit:
    """A change of units of one tensor.

    Args:
        scale: float64, broadcasts against the tensor; None is 1.
        shift: float64, broadcasts against the tensor; None is 0.
        inverse: False for ``new = scale*old + shift``, True for ``old = scale*new + shift``.
        entries: of an edit, what is added to single entries besides.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    inverse: bool = False
    entries: Entries | None = None

    @staticmethod
    def of(scale: Tensor | None, shift: Tensor | None, inverse: bool = False) -> Unit:
        """A unit in which a scale of all ones and a shift of all zeros have become None, and uniform axes size 1."""
        if scale is not None:
            scale = None if bool((scale == 1).all()) else scale
        if shift is not None:
            shift = None if not bool(shift.any()) else shift
        return Unit(scale, shift, inverse and not (scale is None and shift is None))

    @staticmethod
    def of_many(scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Unit | None]:
        """The units of scales and shifts, None where one is not finite; one look at all of them is mostly enough."""
        a, c = (torch.cat([part.reshape(-1) for part in parts]) for parts in (scales, shifts))
        pairs = list(zip(scales, shifts, strict=True))
        if math.isfinite(a.sum() + c.sum()) and not bool((a == 1).any()) and not bool((c == 0).any()):
            return [Unit(scale, shift) for scale, shift in pairs]
        return [Unit.of(scale, shift) if math.isfinite(scale.sum() + shift.sum()) else None for scale, shift in pairs]

    @property
    def has_negative_scale(self) -> bool:
        """True if some element is turned around."""
        return self.scale is not None and bool((self.scale < 0).any())

    @property
    def is_identity(self) -> bool:
        return self.scale is None and self.shift is None and self.entries is None

    def direct(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale, shift) of ``new = scale*old + shift``; raises NotInvertibleError."""
        return _invert(self.scale, self.shift) if self.inverse else (self.scale, self.shift)

    def inverted(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale, shift) of ``old = scale*new + shift``; raises NotInvertibleError."""
        return (self.scale, self.shift) if self.inverse else _invert(self.scale, self.shift)

    def turned(self, inverse: bool) -> Unit:
        """The same change of units in the wanted direction; raises NotInvertibleError."""
        if inverse == self.inverse or self.is_identity:
            return self
        scale, shift = self.inverted() if inverse else self.direct()
        return Unit(scale, shift, inverse)

    def map(self, function: Callable[[Tensor], Tensor]) -> Unit:
        """The unit after a rearrangement of elements, which acts on scale and shift alike."""
        scale = None if self.scale is None else function(self.scale)
        shift = None if self.shift is None else function(self.shift)
        return Unit(scale, shift, self.inverse)

    def rows(self, start: int, size: int) -> Unit:
        """Of an edit, the part for some rows (elements of the first axis) of the tensor."""

        def cut(part: Tensor | None) -> Tensor | None:
            return part if part is None or part.dim() == 0 or part.shape[0] == 1 else part.narrow(0, start, size)

        entries = None if self.entries is None else self.entries.rows(start, size)
        return Unit(cut(self.scale), cut(self.shift), entries=entries)

    def scale_only(self) -> Unit:
        return Unit(self.scale, None, self.inverse and self.scale is not None)

    def axes(self) -> set[int]:
        """The axes along which the unit is not uniform."""
        return _axes(self.scale) | _axes(self.shift)

    def uniform_outside(self, *axes: int) -> bool:
        """True if the unit varies along none but the given axes."""
        return self.axes() <= set(axes)

    def same_as(self, other: Unit) -> bool:
        """Equal up to the rounding of float64. Raises NotInvertibleError if the directions cannot be compared."""
        if self.entries is not other.entries and not (
            self.entries is not None and other.entries is not None and self.entries.same_as(other.entries)
        ):
            return False
        if self.is_identity or other.is_identity:
            return _close(self.scale, other.scale, 1.0) and _close(self.shift, other.shift, 0.0)
        other = other.turned(self.inverse)
        return _close(self.scale, other.scale, 1.0) and _close(self.shift, other.shift, 0.0)


IDENTITY = Unit()


PIECE = 1 << 16
"""Elements of a tensor to work on at a time: few enough to stay in the processor's cache in float64."""


def row_ranges(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(start, size) of pieces of at most `PIECE` elements, or of one row if that is larger; of at least one axis."""
    count = tensor.shape[0]
    rows = max(1, PIECE * count // max(tensor.numel(), 1))
    return ((start, min(rows, count - start)) for start in range(0, count, rows))


def per_channel(vector: Tensor | None, axis: int, dimensions: int) -> Tensor | None:
    """A (channels,) vector as a tensor of ``dimensions`` axes that is full on ``axis`` alone."""
    if vector is None:
        return None
    shape = [1] * dimensions
    shape[axis] = vector.numel()
    return vector.reshape(shape)


def channel_vector(tensor: Tensor | None, axis: int, channels: int, default: float) -> Tensor:
    """The (channels,) vector of a tensor that varies along ``axis`` alone; ``default`` where there is none."""
    if tensor is None:
        return torch.full((channels,), default, dtype=torch.float64, device="cpu")
    return tensor.reshape(-1).expand(channels) if tensor.numel() == 1 else tensor.reshape(channels)


def multiply(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Product of two scales."""
    if a is None:
        return b
    return a if b is None else a * b


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two shifts."""
    if a is None:
        return b
    return a if b is None else a + b


def negative(a: Tensor | None) -> Tensor | None:
    return None if a is None else -a


def reciprocal(scale: Tensor) -> Tensor:
    """``1/scale``; raises NotInvertibleError outside the safe range."""
    magnitude = scale.abs()
    if not bool(((magnitude >= 1 / SAFE_SCALE) & (magnitude <= SAFE_SCALE)).all()):
        raise NotInvertibleError
    return 1 / scale


def scaled(shift: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """A shift times a scale."""
    return None if shift is None else multiply(shift, scale)


def shrink(tensor: Tensor, axes: Iterable[int] | None = None) -> Tensor:
    """The tensor with every one of the axes (None: of all) along which it is uniform reduced to size 1."""
    for axis in range(tensor.dim()) if axes is None else axes:
        if tensor.shape[axis] > 1:
            first = tensor.narrow(axis, 0, 1)
            if tensor.stride(axis) == 0 or bool((tensor == first).all()):
                tensor = first
    return tensor


def broadcasts(tensor: Tensor | None, shape: Sequence[int]) -> bool:
    """True if the tensor, aligned with ``shape``, does not make it larger."""
    if tensor is None:
        return True
    return all(size == 1 or size == full for size, full in zip(tensor.shape, shape, strict=True))


def _invert(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if scale is None:
        return None, negative(shift)
    return reciprocal(scale), None if shift is None else -shift / scale


def _axes(tensor: Tensor | None) -> set[int]:
    return set() if tensor is None else {axis for axis, size in enumerate(tensor.shape) if size != 1}


def _close(a: Tensor | None, b: Tensor | None, default: float) -> bool:
    if a is b:
        return True
    if a is None:
        a, b = b, a
    assert a is not None
    if b is not None and a.shape == b.shape and torch.equal(a, b):
        return True
    other = torch.full((), default, dtype=a.dtype, device="cpu") if b is None else b
    return bool(((a - other).abs() <= _EQUAL * torch.maximum(a.abs(), other.abs())).all())
