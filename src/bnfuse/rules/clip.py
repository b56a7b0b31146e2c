r"""A clip between two parameters, of which either may be the larger one.

With bounds ``p`` and ``q`` it gives the median of x, p and q, and ``median(s*x + t, s*p + t, s*q + t)`` is
``s*median(x, p, q) + t`` for every s but 0, negative ones too. Where s is 0, the bounds say all:

* the result is to become ``c``: it is with both bounds c, and the input may stay as it is;
* the input has been t, so the result has been ``c = median(t, p, q)``: with both bounds c it stays, whatever the input.
  A c of 0 is left to what reads the result, which multiplies by 0, unless something is added to the result first;
* the input becomes t: the result becomes c, and the bounds stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node
from bnfuse.rules.registry import Trial, lower, rule
from bnfuse.units import Unit


@rule("open_clip")
def open_clip(node: Node, trial: Trial) -> None:
    """Any scale and shift: the bounds, which are parameters, take them too. Only where restructuring has put a clip."""
    x, y = node.bound["input"], node.outputs[0]
    bounds = [node.bound["lower"], node.bound["upper"]]

    def clipped(tensor: Tensor) -> Tensor:
        low, high = (trial.content(bound) for bound in bounds)
        return torch.minimum(torch.maximum(tensor, torch.minimum(low, high)), torch.maximum(low, high))

    def turned(unit: Unit) -> Unit:
        """The unit as one of the bounds, which an edit gives them; no scale is too small for that, unless it is 0."""
        if not unit.inverse or unit.is_identity:
            return unit
        scale = torch.ones(1, dtype=torch.float64, device="cpu") if unit.scale is None else 1 / unit.scale
        shift = None if unit.shift is None else -unit.shift * scale
        for bound in bounds:
            contents = trial.content(bound)
            largest = contents.where(contents.isfinite(), 0.0).abs().amax() * scale.abs().amax()
            largest = largest if shift is None else torch.maximum(largest, shift.abs().amax())
            if float(largest) > torch.finfo(bound.dtype).max / _FAR:
                trial.refuse(node, reasons.UNDOES_ZERO_SCALE)
        return Unit(None if unit.scale is None else scale, shift)

    def follow(unit: Unit) -> tuple[Unit, Unit]:
        """The units of the result and of the bounds for one of the input."""
        dead = _dead(unit)
        if dead is None:
            return unit, turned(unit)
        constant = clipped(_shift(unit))
        alive = _alive(unit, dead)
        if unit.inverse:
            told = dead if node.bound["adds"] else dead & (constant != 0)
            return _with_dead(alive, dead & ~told, constant), _with_dead(turned(alive), told, constant)
        return _with_dead(alive, dead, constant), alive

    def precede(unit: Unit) -> tuple[Unit, Unit]:
        """The units of the input and of the bounds for one of the result."""
        dead = _dead(unit)
        if dead is not None and unit.inverse:
            trial.refuse(node, reasons.UNDOES_ZERO_SCALE)
        return (unit if dead is None else _alive(unit, dead)), turned(unit)

    before, after = trial.unit(x), trial.unit(y)
    if before is None and after is None:
        return
    if before is None or (after is not None and _dead(after) is not None and not after.inverse):
        assert after is not None
        other, moved = precede(after)
        trial.demand(x, other)
    else:
        other, moved = follow(before)
        trial.demand(y, other)
    for bound in bounds:
        lowered = lower(moved, bound, y)
        if lowered is None:
            trial.refuse(node, reasons.OPERAND_IS_BROADCAST)
        trial.demand(bound, lowered)


_FAR = 1e3
"""So far from the largest number of their dtype bounds stay."""


def _dead(unit: Unit) -> Tensor | None:
    """Where the scale is 0; None if it is nowhere."""
    dead = None if unit.scale is None else unit.scale == 0
    return dead if dead is not None and bool(dead.any()) else None


def _shift(unit: Unit) -> Tensor:
    assert unit.scale is not None
    return torch.zeros_like(unit.scale) if unit.shift is None else unit.shift


def _alive(unit: Unit, dead: Tensor) -> Unit:
    """The unit without what it says where the scale is 0."""
    assert unit.scale is not None
    return Unit(unit.scale.where(~dead, 1.0), _shift(unit).where(~dead, 0.0), unit.inverse)


def _with_dead(unit: Unit, dead: Tensor, constant: Tensor) -> Unit:
    """The unit with a scale of 0 and a constant in some places."""
    assert unit.scale is not None
    assert unit.shift is not None
    return Unit(unit.scale.where(~dead, 0.0), torch.where(dead, constant, unit.shift), unit.inverse)
