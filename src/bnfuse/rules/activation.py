r"""Functions that a positive scale passes through.

``f(s*x) = s*f(x)`` for ``s >= 0`` holds for every function that is linear on each side of 0: relu, leaky relu,
prelu, abs, a clamp from below at 0. None of them passes a shift. A scale of 0 makes both sides 0.
"""

from __future__ import annotations

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.rules.registry import Family, Trial, lift, link, rule
from bnfuse.units import Unit


def pass_positive_scale(node: Node, trial: Trial, x: Value, y: Value) -> None:
    def checked(unit: Unit) -> Unit:
        if unit.has_negative_scale:
            trial.refuse_negative(node, (x, y), reasons.NO_NEGATIVE_SCALE)
        if unit.shift is not None:
            trial.refuse_shift(node, reasons.NO_SHIFT)
        return unit

    link(trial, x, y, checked, checked)


@rule("relu", "leaky_relu", "abs", "prelu", "_prelu_kernel", family=Family.POSITIVE)
def piecewise_linear(node: Node, trial: Trial) -> None:
    """A scale that is not negative; no shift: linear on each side of 0."""
    for slope in node.inputs[1:]:
        if trial.unit(slope) is not None:
            trial.refuse(node, reasons.SLOPE_IS_FIXED)
    pass_positive_scale(node, trial, node.inputs[0], node.outputs[0])


@rule("clamp", "clamp_min", "threshold", "rrelu", "relu6", "hardtanh")
def one_sided(node: Node, trial: Trial) -> None:
    """A scale that is not negative, where it bends at 0 and nowhere else; no shift.

    A bound from above does not count where a minimum with a parameter comes right before it and stays within it.
    """
    bound = node.bound
    upper = _upper(node)
    at_zero = {
        "clamp": bound.get("min") == 0,
        "clamp_min": bound.get("min") == 0,
        "threshold": bound.get("threshold") == 0 and bound.get("value") == 0,
        "rrelu": not bound.get("training"),
        "relu6": True,
        "hardtanh": bound.get("min_val") == 0,
    }[node.operator]
    if not at_zero or len(node.inputs) != 1:
        trial.refuse_any(node, (*node.inputs, *node.outputs), reasons.BENDS_ELSEWHERE)
    if upper is not None and not _stays_below(node, trial, upper):
        trial.refuse(node, reasons.BENDS_ELSEWHERE)
    pass_positive_scale(node, trial, node.inputs[0], node.outputs[0])


def _upper(node: Node) -> float | None:
    """The bound from above, None for none."""
    return {
        "clamp": node.bound.get("max"),
        "relu6": 6.0,
        "hardtanh": node.bound.get("max_val", 1.0),
    }.get(node.operator)


def _stays_below(node: Node, trial: Trial, upper: float) -> bool:
    """True if the input is a minimum with a parameter that is nowhere above a bound, before or in the new units."""
    x = node.inputs[0]
    maker = x.producer
    if maker is None or maker.operator not in ("minimum", "min") or len(x.consumers) != 1:
        return False
    unit = trial.unit(x) or trial.unit_or_identity(node.outputs[0])
    ceilings = [value for value in maker.inputs if value.kind is Kind.PARAMETER and value.producer is None]
    if not ceilings or unit.shift is not None:
        return False
    scale, _ = unit.direct()
    present = lift(Unit(trial.content(ceilings[0])), ceilings[0], x).scale
    assert present is not None
    moved = present if scale is None else present * scale
    return bool((present <= upper).all()) and bool((moved <= upper * (1 + _ROUNDING)).all())


_ROUNDING = 1e-12
"""A bound in new units may leave the old one by so much of it, in float64."""
