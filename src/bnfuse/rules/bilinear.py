r"""Bilinear layers.

With ``y_o = sum_ij x_i W_oij z_j + b_o``, new units ``x_old = p*x_new``, ``z_old = r*z_new`` and
``y_new = s*y_old + t`` give

    y_new = sum_ij x_new (s_o p_i W_oij r_j) z_new + s_o b_o + t_o,

so the weight takes a scale along each of its three axes, and the bias a shift. A shift of x would leave a term that is
linear in z, for which there is no parameter.
"""

from __future__ import annotations

from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.layers import has_content
from bnfuse.rules.registry import Trial, absorber, rule
from bnfuse.units import Unit, channel_vector, multiply


@rule("bilinear")
def bilinear(node: Node, trial: Trial) -> None:
    """Absorbs any units of the features of its output, and any scale of the features of its inputs; no shift of them.

    A shift of the output needs a bias.
    """
    for value, side in _data(node):
        unit = trial.unit_or_identity(value)
        if not unit.uniform_outside(len(value.shape) - 1):
            axis = min(unit.axes() - {len(value.shape) - 1})
            trial.refuse_unit(node, unit, reasons.WEIGHT_HAS_NO_AXIS, axis=axis, side=side)
        if side == "input" and unit.shift is not None:
            trial.refuse_shift(node, reasons.NO_SHIFT)


def _data(node: Node) -> list[tuple[Value, str]]:
    return [(node.bound["input1"], "input"), (node.bound["input2"], "input"), (node.outputs[0], "output")]


@absorber("bilinear")
def absorb(node: Node, trial: Trial) -> None:
    (first, _), (second, _), (y, _) = _data(node)
    p, _ = trial.unit_or_identity(first).inverted()
    r, _ = trial.unit_or_identity(second).inverted()
    s, t = trial.unit_or_identity(y).direct()
    weight, bias = node.bound["weight"], node.argument("bias")

    def along(scale: Tensor | None, axis: int) -> Tensor | None:
        shape = [-1 if place == axis else 1 for place in range(3)]  # (out, in1, in2)
        return None if scale is None else channel_vector(scale, -1, weight.shape[axis], 1.0).reshape(shape)

    trial.edit(node, weight, Unit(multiply(along(s, 0), multiply(along(p, 1), along(r, 2)))))
    shift = None if t is None else channel_vector(t, -1, weight.shape[0], 0.0)
    if bias is None:
        if shift is not None:
            trial.refuse_shift(node, reasons.NO_BIAS)
        return
    gain = None if s is None else channel_vector(s, -1, weight.shape[0], 1.0)
    trial.edit(node, bias, Unit(gain if shift is not None or has_content(bias, trial) else None, shift))
