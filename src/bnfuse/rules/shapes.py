r"""Operators that only rearrange elements: units travel with them.

A reshape is a list of independent blocks: runs of axes of the input and of the output with the same number of
elements, as (B, N, C) -> (B*N, C) has the blocks B, N -> B*N and C -> C. A unit that is uniform on a block stays
uniform on it, so only the blocks on which it varies are written out in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node
from bnfuse.rules.identity import HANDED_ON
from bnfuse.rules.registry import Family, Trial, link, rule
from bnfuse.units import Unit, shrink

_RESHAPES = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "_reshape_alias", "atleast_1d", "atleast_2d", "atleast_3d",
)  # fmt: skip
_PERMUTATIONS = ("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint")


@rule(*_RESHAPES, family=Family.REARRANGEMENT)
def reshape(node: Node, trial: Trial) -> None:
    """Any units, which are reshaped alike."""
    x, y = node.inputs[0], node.outputs[0]
    if x.elements == 0:
        trial.refuse(node, reasons.IS_EMPTY)
    link(
        trial,
        x,
        y,
        lambda unit: unit.map(lambda tensor: reshaped(tensor, x.shape, y.shape)),
        lambda unit: unit.map(lambda tensor: reshaped(tensor, y.shape, x.shape)),
    )


@rule(*_PERMUTATIONS, family=Family.REARRANGEMENT)
def permute(node: Node, trial: Trial) -> None:
    """Any units, which are permuted alike."""
    x, y = node.inputs[0], node.outputs[0]
    order = _order(node, len(x.shape))
    back = [order.index(axis) for axis in range(len(order))]
    link(
        trial,
        x,
        y,
        lambda unit: unit.map(lambda tensor: tensor.permute(order)),
        lambda unit: unit.map(lambda tensor: tensor.permute(back)),
    )


def _order(node: Node, rank: int) -> list[int]:
    """Which input axis each output axis is."""
    axes = list(range(rank))
    bound = node.bound
    if node.operator == "permute":
        return [axis % rank for axis in bound["dims"]]
    if node.operator == "numpy_T":
        return axes[::-1]
    if node.operator in ("movedim", "moveaxis"):
        source, destination = (
            [number] if isinstance(number, int) else list(number) for number in (bound["source"], bound["destination"])
        )
        moved = {to % rank: start % rank for start, to in zip(source, destination, strict=True)}
        rest = iter(axis for axis in axes if axis not in moved.values())
        return [moved[axis] if axis in moved else next(rest) for axis in axes]
    if rank < 2:
        return axes
    if node.operator in ("t", "mT", "adjoint"):
        first, second = -2, -1
    else:
        first = bound["dim0"] if "dim0" in bound else bound["axis0"]
        second = bound["dim1"] if "dim1" in bound else bound["axis1"]
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def is_rearrangement(node: Node) -> bool:
    """True for an operator that reshapes or permutes its input, or hands it on, possibly in another dtype."""
    handed_on = node.operator in HANDED_ON and not node.operator.endswith("dropout")
    return handed_on or node.operator in _RESHAPES or node.operator in _PERMUTATIONS


def rearranged(node: Node, tensor: Tensor) -> Tensor:
    """A tensor that broadcasts against the input of a rearrangement, as one that broadcasts against its output."""
    x, y = node.inputs[0], node.outputs[0]
    if node.operator in _RESHAPES:
        return reshaped(tensor, x.shape, y.shape)
    return tensor.permute(_order(node, len(x.shape))) if node.operator in _PERMUTATIONS else tensor


@rule("expand", "expand_as", "broadcast_to")
def expand(node: Node, trial: Trial) -> None:
    """Any units; all copies have the same ones."""
    x, y = node.inputs[0], node.outputs[0]
    missing = len(y.shape) - len(x.shape)

    def forward(unit: Unit) -> Unit:
        return unit.map(lambda tensor: tensor.reshape([1] * missing + list(tensor.shape)))

    def backward(unit: Unit) -> Unit:
        for axis in unit.axes():
            if axis < missing or x.shape[axis - missing] == 1:
                trial.refuse_unit(node, unit, reasons.COPIES_DIFFER)
        return unit.map(lambda tensor: tensor.reshape(tensor.shape[missing:]))

    link(trial, x, y, forward, backward)


@rule("flip", "roll", family=Family.REARRANGEMENT)
def reorder(node: Node, trial: Trial) -> None:
    """Any units, which are reordered alike; ``roll`` with ``dims``."""
    x, y = node.inputs[0], node.outputs[0]
    if node.operator == "flip":
        dims = list(node.bound["dims"])
        steps = dict.fromkeys((axis % len(x.shape) for axis in dims), None)
    else:
        dims, shifts = node.argument("dims", []), node.bound["shifts"]
        dims = [dims] if isinstance(dims, int) else dims
        shifts = [shifts] if isinstance(shifts, int) else shifts
        if not dims:
            trial.refuse(node, reasons.ROLLS_FLATTENED)
        steps = {}
        for axis, shift in zip(dims, shifts, strict=True):
            steps[axis % len(x.shape)] = (steps.get(axis % len(x.shape)) or 0) + shift

    def moved(sign: int) -> Callable[[Tensor], Tensor]:
        def move(tensor: Tensor) -> Tensor:
            for axis, step in steps.items():
                if tensor.shape[axis] > 1:
                    tensor = tensor.flip(axis) if step is None else tensor.roll(sign * step, axis)
            return tensor

        return move

    link(trial, x, y, lambda unit: unit.map(moved(1)), lambda unit: unit.map(moved(-1)))


@rule("repeat", "tile")
def repeat(node: Node, trial: Trial) -> None:
    """Any units; all copies have the same ones."""
    x, y = node.inputs[0], node.outputs[0]
    times = list(node.argument("repeats", node.argument("dims")))
    times = [1] * (len(y.shape) - len(times)) + times
    missing = len(y.shape) - len(x.shape)

    def forward(unit: Unit) -> Unit:
        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.reshape([1] * missing + list(tensor.shape))
            return tensor.repeat([count if size > 1 else 1 for count, size in zip(times, tensor.shape, strict=True)])

        return unit.map(copy)

    def backward(unit: Unit) -> Unit:
        def first(tensor: Tensor) -> Tensor:
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    tensor = tensor.narrow(axis, 0, size // times[axis])
            return tensor.reshape(tensor.shape[missing:])

        return unit.map(first)

    of_y = trial.unit(y)
    if of_y is not None and not forward(backward(of_y)).same_as(of_y):
        trial.refuse_unit(node, of_y, reasons.COPIES_DIFFER)
    link(trial, x, y, forward, backward)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", family=Family.REARRANGEMENT)
def shuffle(node: Node, trial: Trial) -> None:
    """Any units: a reshape, a permutation, a reshape.

    Channels move to positions within a block of pixels, or back, or among themselves.
    """
    x, y = node.inputs[0], node.outputs[0]
    name = node.operator.removeprefix("native_")
    if name == "channel_shuffle":
        groups = node.bound["groups"]
        batch, channels, *rest = x.shape
        apart = (batch, groups, channels // groups, *rest)
        order = [0, 2, 1, *range(3, len(apart))]
        steps = _Rearrangement(x.shape, apart, order, y.shape)
    elif name == "pixel_shuffle":
        steps = _pixel_shuffle(x.shape, y.shape, node.bound["upscale_factor"])
    else:
        steps = _pixel_shuffle(y.shape, x.shape, node.bound["downscale_factor"]).reverse()
    back = steps.reverse()
    link(trial, x, y, lambda unit: unit.map(steps.apply), lambda unit: unit.map(back.apply))


@dataclass(frozen=True)
class _Rearrangement:
    """A reshape to ``apart``, a permutation of its axes, and a reshape to ``target``."""

    source: Sequence[int]
    apart: Sequence[int]
    order: Sequence[int]
    target: Sequence[int]

    def apply(self, tensor: Tensor) -> Tensor:
        tensor = reshaped(tensor, self.source, self.apart).permute(list(self.order))
        return reshaped(tensor, [self.apart[axis] for axis in self.order], self.target)

    def reverse(self) -> _Rearrangement:
        together = [self.apart[axis] for axis in self.order]
        back = [list(self.order).index(axis) for axis in range(len(self.order))]
        return _Rearrangement(self.target, together, back, self.source)


def _pixel_shuffle(source: Sequence[int], target: Sequence[int], factor: int) -> _Rearrangement:
    *batch, channels, height, width = source
    apart = (*batch, channels // factor**2, factor, factor, height, width)
    c = len(batch)
    order = [*range(c), c, c + 3, c + 1, c + 4, c + 2]  # channel, height, row of block, width, column of block
    return _Rearrangement(source, apart, order, target)


def reshaped(tensor: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """A tensor that broadcasts against ``source`` as one that broadcasts against ``target``, by the same reshape."""
    full: list[int] = []
    result: list[int] = []
    mixed = False
    for axes, sizes in _blocks(source, target):
        varies = any(tensor.shape[axis] != 1 for axis in axes)
        full += [source[axis] if varies else 1 for axis in axes]
        result += sizes if varies else [1] * len(sizes)
        mixed = mixed or (varies and not len(axes) == len(sizes) == 1)
    tensor = tensor.expand(full).reshape(result)
    return shrink(tensor) if mixed else tensor


def _blocks(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of source axes (by number) and target axes (by size) with equal numbers of elements, as short as can be."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        axes, sizes = ([i], [target[j]]) if i < len(source) and j < len(target) else ([], [])
        if not axes:  # only axes of size 1 are left on one side
            axes, sizes = list(range(i, len(source))), list(target[j:])
            blocks.append((axes, sizes))
            break
        left, right = source[i], target[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                axes.append(i)
                left *= source[i]
                i += 1
            else:
                sizes.append(target[j])
                right *= target[j]
                j += 1
        blocks.append((axes, sizes))
    return blocks
