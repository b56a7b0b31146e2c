r"""Pooling over positions.

A mean of ``s*x + t`` over positions with the same ``s`` and ``t`` is ``s*mean(x) + t``; a maximum likewise if
``s >= 0``. Average pooling that counts padded zeros, or divides by something else than the number of elements, passes
no shift. Maximum pooling pads with minus infinity, which changes nothing. Interpolation takes averages too: its weights
sum to one. A sum is a mean times the number of elements, which must not depend on the size of the input. A standard
deviation of ``s*x + t`` is ``|s|*std(x)``, a variance ``s**2*var(x)``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Family, Trial, link, rule
from bnfuse.units import Unit

_Change = Callable[[Unit], Unit]


def _pool(
    node: Node, trial: Trial, axes: set[int], y: Value, keep: bool, there: _Change, back: _Change | None = None
) -> None:
    """Tie x to its pooled y: the unit must be uniform along the pooled axes, which y keeps or loses.

    Args:
        there: what becomes of the unit of x besides, and of that of y on its way ``back``, if that is another.
    """
    x = node.inputs[0]

    def forward(unit: Unit) -> Unit:
        if unit.axes() & axes:
            trial.refuse_unit(node, unit, reasons.POOLED_DIFFER)
        unit = there(unit)
        kept = [axis for axis in range(len(x.shape)) if axis not in axes]
        return unit if keep else unit.map(lambda tensor: tensor.reshape([tensor.shape[axis] for axis in kept]))

    def backward(unit: Unit) -> Unit:
        if keep and unit.axes() & axes:
            trial.refuse_unit(node, unit, reasons.OUTPUTS_DIFFER)
        unit = (back or there)(unit)
        if keep:
            return unit

        def widen(tensor: Tensor) -> Tensor:
            for axis in sorted(axes):
                tensor = tensor.unsqueeze(axis)
            return tensor

        return unit.map(widen)

    link(trial, x, y, forward, backward)


def _passed(node: Node, trial: Trial, maximum: bool, shift: bool = True) -> _Change:
    """Units pass as they are, unless a maximum meets a negative scale, or a shift what takes none."""
    if maximum:
        trial.tie((node.inputs[0], node.outputs[0]))

    def checked(unit: Unit) -> Unit:
        if maximum and unit.has_negative_scale:
            trial.refuse_negative(node, (node.inputs[0], node.outputs[0]), reasons.MAXIMUM_NEGATIVE_SCALE)
        if not shift and unit.shift is not None:
            trial.refuse_shift(node, reasons.DOES_NOT_DIVIDE)
        return unit

    return checked


@rule(*(f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3)), family=Family.AVERAGE)
@rule(*(f"{kind}_pool{n}d" for kind in ("max", "adaptive_max") for n in (1, 2, 3)))
@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def pool(node: Node, trial: Trial) -> None:
    """Units that are uniform over what is pooled: the mean of ``s*x + t``.

    A maximum takes any shift and no negative scale: it keeps the order, and its padding is minus infinity. An
    average takes no shift if padded zeros are counted, or with ``divisor_override``.
    """
    name = node.operator.removesuffix("_with_indices")
    rank = len(node.inputs[0].shape)
    axes = set(range(rank - int(name[-2]), rank))
    divides = True
    if name.startswith("avg"):
        padded = node.argument("padding", 0)
        padded = padded if isinstance(padded, int) else any(padded)
        divides = not (padded and node.argument("count_include_pad", True))
        divides = divides and node.argument("divisor_override") is None
    if len(node.outputs) > 1 and (node.outputs[1].consumers or node.outputs[1].pinned):
        unit = trial.unit(node.outputs[0]) or trial.unit(node.inputs[0])
        if unit is not None and unit.scale is not None and bool((unit.scale <= 0).any()):
            trial.refuse(node, reasons.POSITIONS_OF_MAXIMA)
    _pool(node, trial, axes, node.outputs[0], True, _passed(node, trial, "max" in name, divides))


@rule("mean", family=Family.AVERAGE)
@rule("amax", "amin")
def reduce(node: Node, trial: Trial) -> None:
    """Units that are uniform over what is reduced; through a maximum no negative scale."""
    axes, keep = _reduced(node)
    _pool(node, trial, axes, node.outputs[0], keep, _passed(node, trial, node.operator != "mean"))


def _reduced(node: Node) -> tuple[set[int], bool]:
    """The axes that an operator reduces, and whether they are kept with size 1."""
    rank = len(node.inputs[0].shape)
    dim = node.argument("dim")
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return ({axis % rank for axis in dims} if rank else set()), bool(node.argument("keepdim", False))


@rule("std", "var")
def deviation(node: Node, trial: Trial) -> None:
    """Of the input any shift, and a scale as its magnitude (``var``: its square): ``std(s*x + t) = |s|*std(x)``.

    The units are uniform over what is reduced. On the output no negative scale and no shift.
    """
    axes, keep = _reduced(node)
    variance = node.operator == "var"

    def there(unit: Unit) -> Unit:
        scale = unit.scale
        return Unit(None if scale is None else scale.square() if variance else scale.abs(), None, unit.inverse)

    def back(unit: Unit) -> Unit:
        if unit.shift is not None:
            trial.refuse_shift(node, reasons.DEVIATION_SHIFT)
        if unit.has_negative_scale:
            trial.refuse_negative(node, node.outputs, reasons.DEVIATION_NEGATIVE_SCALE)
        return Unit(unit.scale.sqrt() if variance and unit.scale is not None else unit.scale, None, unit.inverse)

    _pool(node, trial, axes, node.outputs[0], keep, there, back)


_INTERPOLATIONS = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip


@rule(*_INTERPOLATIONS)
def interpolate(node: Node, trial: Trial) -> None:
    """Units that are uniform over positions: its weights sum to one."""
    axes = set(range(2, len(node.inputs[0].shape)))
    _pool(node, trial, axes, node.outputs[0], True, _passed(node, trial, False))


@rule("sum", family=Family.AVERAGE)
def total(node: Node, trial: Trial) -> None:
    """A scale that is uniform over what is added; the shift times the number of elements that are added.

    That number must be the same at every input size.
    """
    x, y = node.inputs[0], node.outputs[0]
    rank = len(x.shape)
    reduced, keep = _reduced(node)
    axes = sorted(reduced)
    count = 1
    for axis in axes:
        count *= x.shape[axis]

    def forward(unit: Unit) -> Unit:
        if unit.scale is not None and any(unit.scale.shape[axis] != 1 for axis in axes):
            trial.refuse(node, reasons.ADDS_DIFFERENT_SCALES)
        if unit.shift is not None:
            trial.assume(node)
            for axis in axes:
                if unit.shift.shape[axis] == 1:
                    unit = Unit(unit.scale, unit.shift * x.shape[axis], unit.inverse)
        summed = Unit(
            unit.scale,
            None if unit.shift is None or not axes else unit.shift.sum(axes, keepdim=True),
            unit.inverse,
        )
        kept = [axis for axis in range(rank) if axis not in axes]
        return summed if keep else summed.map(lambda tensor: tensor.reshape([tensor.shape[axis] for axis in kept]))

    def backward(unit: Unit) -> Unit:
        if unit.shift is not None:
            trial.assume(node)

        def widen(tensor: Tensor) -> Tensor:
            for axis in () if keep else axes:
                tensor = tensor.unsqueeze(axis)
            return tensor

        wide = unit.map(widen)
        return Unit(wide.scale, None if wide.shift is None else wide.shift / count, wide.inverse)

    link(trial, x, y, forward, backward)
