r"""Padding as an operator of its own.

Reflected, replicated and circular padding repeats elements: any units pass that are uniform along the padded axes.
Padded zeros stay zeros under a scale and not under a shift. Along an axis on which the units vary (zeros padded to
the channels, as in some shortcuts), the new channels take any scale and no shift. Padding with minus infinity, as
before a maximum, passes what a maximum passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node
from bnfuse.rules.registry import Trial, rule
from bnfuse.units import Unit

_Margins = dict[int, tuple[int, int]]


PADDINGS = (
    "pad", "constant_pad_nd", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)  # fmt: skip


@rule(*PADDINGS)
def pad(node: Node, trial: Trial) -> None:
    """Reflected, replicated, circular: units that are uniform along the padded axes, as elements are repeated.

    Padding with 0 takes a scale and no shift; what only crops, any units; channels that are added as zeros take any
    scale. Minus infinity lets pass what a maximum does.
    """
    x, y = node.inputs[0], node.outputs[0]
    margins = margins_of(node)
    constant = node.operator == "constant_pad_nd" or (
        node.operator == "pad" and node.argument("mode", "constant") == "constant"
    )

    def forward(unit: Unit) -> Unit:
        return _padded(unit, margins)

    def backward(unit: Unit) -> Unit:
        return _padded(unit, {axis: (-before, -after) for axis, (before, after) in margins.items()})

    of_x, of_y = trial.unit(x), trial.unit(y)
    for unit in (of_x, of_y):
        if unit is not None:
            _check(node, trial, unit, margins, constant)
    if of_y is not None and of_y.shift is not None and constant and not _same_shift(forward(backward(of_y)), of_y):
        trial.refuse_shift(node, reasons.PADS_WITH_A_NUMBER)
    if of_x is not None and of_y is not None:
        if not backward(forward(of_x)).same_as(backward(of_y)):
            trial.refuse(node, reasons.PADDING_DOES_NOT_FIT)
    elif of_x is not None and not of_x.is_identity:
        trial.demand(y, forward(of_x))
    elif of_y is not None and not of_y.is_identity:
        trial.demand(x, backward(of_y))


def _same_shift(a: Unit, b: Unit) -> bool:
    return Unit(None, a.shift, a.inverse and a.shift is not None).same_as(Unit(None, b.shift, b.inverse))


def margins_of(node: Node) -> _Margins:
    """How much each axis is padded before and after; less than 0 where it is cropped."""
    amounts = node.argument("pad", node.argument("padding"))
    rank = len(node.inputs[0].shape)
    margins = {rank - 1 - i // 2: (amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)}
    return {axis: margin for axis, margin in margins.items() if any(margin)}


def _check(node: Node, trial: Trial, unit: Unit, margins: _Margins, constant: bool) -> None:
    number = node.argument("value", 0) or 0
    padded = {axis for axis, margin in margins.items() if max(margin) > 0}
    if not constant:
        if unit.axes() & padded:
            trial.refuse_unit(node, unit, reasons.PADDED_AXIS_VARIES)
    elif number == -math.inf:
        if unit.scale is not None and bool((unit.scale <= 0).any()):
            trial.refuse(node, reasons.PADS_MINUS_INFINITY)
    elif number != 0 and unit.scale is not None and padded:
        trial.refuse(node, reasons.PADS_WITH, number=number)
    elif unit.shift is not None and padded - _axes(unit.shift):
        trial.refuse_shift(node, reasons.PADS_WITH_A_NUMBER)
    elif unit.shift is not None:
        trial.assume(node)  # that it pads no other axis at another size


def _axes(tensor: Tensor) -> set[int]:
    return {axis for axis, size in enumerate(tensor.shape) if size != 1}


def _padded(unit: Unit, margins: _Margins) -> Unit:
    """The unit with the elements added, or cropped, along the axes on which it varies."""
    scale = None if unit.scale is None else _widened(unit.scale, margins, 1.0)
    shift = None if unit.shift is None else _widened(unit.shift, margins, 0.0)
    return Unit.of(scale, shift, unit.inverse)


def _widened(tensor: Tensor, margins: _Margins, fill: float) -> Tensor:
    for axis in _axes(tensor) & margins.keys():
        before, after = margins[axis]
        cropped = max(-before, 0)
        parts = [tensor.narrow(axis, cropped, tensor.shape[axis] - cropped - max(-after, 0))]
        for size, place in ((before, 0), (after, 2)):
            if size > 0:
                shape = list(tensor.shape)
                shape[axis] = size
                parts.insert(place, torch.full(shape, fill, dtype=tensor.dtype, device="cpu"))
        tensor = torch.cat(parts, axis)
    return tensor
