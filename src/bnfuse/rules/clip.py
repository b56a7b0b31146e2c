r"""A clip between two parameters, of which either may be the larger one.

With bounds ``p`` and ``q`` it gives the median of x, p and q, and ``median(s*x + t, s*p + t, s*q + t)`` is
``s*median(x, p, q) + t`` for every s but 0, negative ones too. For s = 0 the input is t, and the result is
``median(t, p, q)``: the bounds stay as they are, and the shift is clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node
from bnfuse.rules.registry import Trial, link, lower, rule
from bnfuse.units import Unit


@rule("clip")
def clip(node: Node, trial: Trial) -> None:
    """Any scale and shift: the bounds, which are parameters, take them too. Only where restructuring has put a clip."""
    x, y = node.bound["input"], node.outputs[0]
    bounds = [node.bound["lower"], node.bound["upper"]]

    def forward(unit: Unit) -> Unit:
        if unit.scale is None or not bool((unit.scale == 0).any()):
            return unit
        shift = torch.zeros_like(unit.scale) if unit.shift is None else unit.shift
        low, high = (trial.content(bound) for bound in bounds)
        constant = torch.minimum(torch.maximum(shift, torch.minimum(low, high)), torch.maximum(low, high))
        return Unit.of(unit.scale, torch.where(unit.scale == 0, constant, shift), unit.inverse)

    def backward(unit: Unit) -> Unit:
        if unit.scale is not None and bool((unit.scale == 0).any()):
            trial.refuse(node, reasons.UNDOES_ZERO_SCALE)
        return unit

    link(trial, x, y, forward, backward)
    unit = trial.unit_or_identity(x)
    if unit.is_identity:
        return
    moved = _of_bounds(unit)
    for bound in bounds:
        lowered = lower(moved, bound, y)
        if lowered is None:
            trial.refuse(node, reasons.OPERAND_IS_BROADCAST)
        trial.demand(bound, lowered)


def _of_bounds(unit: Unit) -> Unit:
    if unit.scale is None or not bool((unit.scale == 0).any()):
        return unit
    alive = unit.scale != 0
    shift: Tensor | None = None if unit.shift is None else unit.shift.where(alive, 0.0)
    return Unit(unit.scale.where(alive, 1.0), shift, unit.inverse)
