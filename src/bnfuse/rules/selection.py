r"""Operators whose result has, at each place, the element of one of several operands.

The larger of two, the one that a condition tells, a number where a mask says so: if all operands have the same units,
the result has them too. The larger one stays the larger one under a scale that is not negative. A number or a constant
``v`` among the operands cannot be edited, so the units must leave it as it is: ``s*v + t = v``, as a scale does with 0,
and a positive one with minus infinity. But where the same mask writes over it again, it does not matter what it
becomes: see :mod:`bnfuse.rules.masks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.rules.masks import Mask, filled, is_written_over, mask_of
from bnfuse.rules.registry import Trial, forbid, lift, lower, rule
from bnfuse.units import Unit


@rule("maximum", "minimum", "max", "min")
def extremum(node: Node, trial: Trial) -> None:
    """Two tensors: the same units on both and on the result, the scale not negative.

    A constant operand must stay as it is. Over an axis nothing passes.
    """
    if "other" not in node.bound:
        for value in (*node.inputs, *node.outputs):
            if trial.unit(value) is not None:
                trial.refuse_any(node, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES)
        return
    unit = share(node, trial, [node.bound["self"], node.bound["other"]])
    if unit is not None and unit.has_negative_scale:
        trial.refuse_negative(node, (*node.inputs, *node.outputs), reasons.MAXIMUM_NEGATIVE_SCALE)


@rule("where")
def choose(node: Node, trial: Trial) -> None:
    """The same units on both operands and on the result: each element is one of an operand.

    A number or a constant among them must stay as it is: 0 under a scale, infinities under a positive one. It need
    not where the same condition replaces it again.
    """
    condition, y = node.bound["condition"], node.outputs[0]
    forbid(node, trial, [condition], reasons.NOTHING_PASSES)
    if "self" not in node.bound:
        return
    mask = mask_of(condition)
    places = ((node.bound["self"], mask), (node.bound["other"], None if mask is None else ~mask))
    share(node, trial, [operand for operand, where in places if not _is_idle(trial, operand, y, where)])


@rule("masked_fill")
def fill(node: Node, trial: Trial) -> None:
    """The same units on the input and on the result.

    The number must stay as it is: 0 under a scale, infinities under a positive one. It need not where the same mask
    replaces it again.
    """
    x, number = node.bound["self"], node.bound["value"]
    idle = _is_idle(trial, number, node.outputs[0], filled(node))
    share(node, trial, [x] if idle else [x, number])


@rule("index_put")
def fill_places(node: Node, trial: Trial) -> None:
    """Any units where a mask tells the places of one number (``x[mask] = 0``) and the same mask replaces it again.

    Else nothing, since the number may be made from the input.
    """
    x, number, y = node.bound["self"], node.bound["values"], node.outputs[0]
    finite = number.tensor is not None and not number.shape and bool(torch.isfinite(number.tensor).all())
    if not finite or not is_written_over(y, filled(node), trial):
        forbid(node, trial, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES)
        return
    share(node, trial, [x])


def _is_idle(trial: Trial, operand: Value | float, y: Value, mask: Mask | None) -> bool:
    """True for a number or constant whose places in the result are written over again."""
    if not is_written_over(y, mask, trial):
        return False
    if not isinstance(operand, Value):
        return math.isfinite(operand)
    if operand.producer is not None and operand.producer.operator in _ZEROS_AND_ONES:
        return True
    known = operand.independent and operand.kind is not Kind.PARAMETER
    return known and bool(torch.isfinite(trial.content(operand)).all())


_ZEROS_AND_ONES = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones")


def share(node: Node, trial: Trial, operands: Sequence[Value | float]) -> Unit | None:
    """Give the result and all operands the units that one of them has."""
    z = node.outputs[0]
    values = [z, *(operand for operand in operands if isinstance(operand, Value))]
    given = next((value for value in values if not trial.unit_or_identity(value).is_identity), None)
    if given is None:
        return None
    present = trial.unit(given)
    assert present is not None
    unit = lift(present, given, z)
    for operand in (z, *operands):
        if not isinstance(operand, Value):
            _check_fixed(node, trial, torch.tensor(float(operand), dtype=torch.float64, device="cpu"), unit)
        elif operand.independent and operand.kind is not Kind.PARAMETER:
            contents = trial.content(operand).double()
            _check_fixed(
                node, trial, contents.reshape([1] * (len(z.shape) - contents.dim()) + list(contents.shape)), unit
            )
        else:
            lowered = lower(unit, operand, z)
            if lowered is None:
                trial.refuse(node, reasons.OPERAND_IS_BROADCAST)
            trial.tie((given, operand))
            trial.demand(operand, lowered)
    return unit


def _check_fixed(node: Node, trial: Trial, contents: Tensor, unit: Unit) -> None:
    moved = contents if unit.scale is None else contents * unit.scale
    moved = moved if unit.shift is None else moved + unit.shift
    if not bool((moved == contents).all()):
        trial.refuse_unit(node, unit, reasons.PUTS_IN_A_NUMBER)
