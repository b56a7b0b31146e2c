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

from bnfuse.graph import Node
from bnfuse.rules.registry import Trial, link, rule
from bnfuse.units import Unit


@rule(
    "pad",
    "constant_pad_nd",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)
def pad(node: Node, trial: Trial) -> None:
    x, y = node.inputs[0], node.outputs[0]
    amounts = node.argument("pad", node.argument("padding"))
    rank = len(x.shape)
    margins = {rank - 1 - i // 2: (amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)}
    margins = {axis: margin for axis, margin in margins.items() if any(margin)}
    constant = node.operator == "constant_pad_nd" or (
        node.operator == "pad" and node.argument("mode", "constant") == "constant"
    )
    number = node.argument("value", 0) or 0

    def checked(unit: Unit) -> Unit:
        varying = unit.axes() & margins.keys()
        if not constant:
            if varying:
                trial.refuse(node, "the units vary along the axis that it pads", scale=unit.scale is not None)
            return unit
        if number == -math.inf:
            if unit.scale is not None and bool((unit.scale <= 0).any()):
                trial.refuse(node, "minus infinity stays so under a positive scale only", scale=True)
        elif number != 0 and unit.scale is not None:
            trial.refuse(node, f"it pads with {number}, which cannot be rescaled", scale=True)
        elif (unit.shift is not None and not _axes(unit.shift) & margins.keys()) or (
            unit.shift is not None and any(axis not in varying for axis in margins)
        ):
            trial.refuse(node, f"it pads with {number}, which would not be shifted")
        return unit

    def forward(unit: Unit) -> Unit:
        unit = checked(unit)
        return Unit(_widened(unit.scale, margins, 1.0), _widened(unit.shift, margins, 0.0), unit.inverse)

    def backward(unit: Unit) -> Unit:
        unit = checked(unit)
        inner = Unit(_cut(unit.scale, margins, x.shape), _cut(unit.shift, margins, x.shape), unit.inverse)
        outer = _widened(inner.shift, margins, 0.0)
        if (
            unit.shift is not None
            and outer is not None
            and not bool(torch.equal(outer.expand_as(unit.shift), unit.shift))
        ):
            trial.refuse(node, f"it pads with {number}, which would not be shifted")
        return inner

    if constant and trial.unit(y) is not None and trial.unit(x) is not None:
        backward(trial.unit(y) or Unit())
        if not _same_inside(trial, node, backward):
            trial.refuse(node, "its input and output would get different units", scale=True)
        return
    link(trial, x, y, forward, backward)


def _same_inside(trial: Trial, node: Node, backward: object) -> bool:
    of_x, of_y = trial.unit(node.inputs[0]), trial.unit(node.outputs[0])
    assert of_x is not None
    assert of_y is not None
    return of_x.same_as(backward(of_y))  # type: ignore[operator]


def _axes(tensor: Tensor) -> set[int]:
    return {axis for axis, size in enumerate(tensor.shape) if size != 1}


def _widened(tensor: Tensor | None, margins: dict[int, tuple[int, int]], fill: float) -> Tensor | None:
    """The tensor with the padded elements added along the axes on which it varies."""
    if tensor is None:
        return None
    for axis in _axes(tensor) & margins.keys():
        before, after = margins[axis]
        parts = []
        for size in (before, after):
            shape = list(tensor.shape)
            shape[axis] = max(size, 0)
            parts.append(torch.full(shape, fill, dtype=tensor.dtype))
        size = tensor.shape[axis]
        kept = tensor.narrow(axis, max(-before, 0), size - max(-before, 0) - max(-after, 0))
        tensor = torch.cat([parts[0], kept, parts[1]], axis)
    return tensor


def _cut(tensor: Tensor | None, margins: dict[int, tuple[int, int]], shape: tuple[int, ...]) -> Tensor | None:
    """The part of the tensor that belongs to the input; where the padding is negative the rest is 1 or 0."""
    if tensor is None:
        return None
    for axis in _axes(tensor) & margins.keys():
        tensor = tensor.narrow(axis, margins[axis][0], shape[axis]) if min(margins[axis]) >= 0 else tensor
    return tensor
