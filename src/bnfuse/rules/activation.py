r"""Functions that a positive scale passes through.

``f(s*x) = s*f(x)`` for ``s >= 0`` holds for every function that is linear on each side of 0: relu, leaky relu,
prelu, abs, a clamp from below at 0. None of them passes a shift. A scale of 0 makes both sides 0.
"""

from __future__ import annotations

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Family, Trial, link, rule
from bnfuse.units import Unit


def pass_positive_scale(node: Node, trial: Trial, x: Value, y: Value) -> None:
    def checked(unit: Unit) -> Unit:
        if unit.has_negative_scale:
            trial.refuse(node, reasons.NO_NEGATIVE_SCALE)
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


@rule("clamp", "clamp_min", "threshold", "rrelu")
def one_sided(node: Node, trial: Trial) -> None:
    """A scale that is not negative, where it bends at 0 and nowhere else; no shift."""
    bound = node.bound
    at_zero = {
        "clamp": bound.get("min") == 0 and bound.get("max") is None,
        "clamp_min": bound.get("min") == 0,
        "threshold": bound.get("threshold") == 0 and bound.get("value") == 0,
        "rrelu": not bound.get("training"),
    }[node.operator]
    if not at_zero or len(node.inputs) != 1:
        trial.refuse(node, reasons.BENDS_ELSEWHERE)
    pass_positive_scale(node, trial, node.inputs[0], node.outputs[0])
