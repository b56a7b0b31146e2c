r"""Batch norms: removed, or kept and re-expressed.

A norm in evaluation computes ``y = a*x + c`` with ``a = weight/sqrt(var + eps)``, ``c = bias - mean*a``. Removing it
gives its input and output the same new tensor (``torch.nn.utils.fusion`` has the two-layer case of this formula).

A norm that stays absorbs any units on both sides. With ``x_old = p*x_new + q`` and ``y_new = s*y_old + t``,

    y_new = s*(weight/sigma*(p*x_new + q - mean) + bias) + t,

which is the same norm, with the same statistics, for ``weight' = s*p*weight`` and
``bias' = s*bias + t + s*weight/sigma*(q + (p - 1)*mean)``.

Every norm whose statistics come from its input (layer norm, group norm, instance norm, rms norm, a batch norm that
uses the statistics of the batch) ends in ``weight*(...) + bias``, so it absorbs units of its output likewise; its
input must stay as it is.
"""

from __future__ import annotations

from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node
from bnfuse.rules.norm_statistics import CHANNELS, FARTHEST, distance, offset, parts
from bnfuse.rules.registry import Trial, absorber, forbid, rule
from bnfuse.units import Unit, add, channel_vector, multiply


@rule("batch_norm")
def batch_norm(node: Node, trial: Trial) -> None:
    """A norm that stays absorbs any units of the channels of its input and of its output.

    What a module lacks (weight, bias) can be added. With the statistics of the batch it is as a layer norm.
    """
    if node.argument("training"):
        norm_of_input(node, trial)
        return
    for value in (node.bound["input"], node.outputs[0]):
        unit = trial.unit_or_identity(value)
        if not unit.uniform_outside(CHANNELS):
            trial.refuse_unit(node, unit, reasons.GAIN_PER_CHANNEL)
    # What it cannot undo is better known now than when it absorbs.
    trial.unit_or_identity(node.bound["input"]).inverted()
    trial.unit_or_identity(node.outputs[0]).direct()


@absorber("batch_norm")
def absorb_batch_norm(node: Node, trial: Trial) -> None:
    x, y = node.bound["input"], node.outputs[0]
    if node.argument("training"):
        absorb_output(node, trial)
        return
    p, q = trial.unit_or_identity(x).inverted()
    s, t = trial.unit_or_identity(y).direct()
    if p is None and q is None and s is None and t is None:
        _edit(node, trial, None, None, None)
        return
    weight, sigma, mean, _ = parts(node, trial)

    def vector(tensor: Tensor | None, default: float) -> Tensor | None:
        return None if tensor is None else channel_vector(tensor, CHANNELS, x.shape[CHANNELS], default)

    if q is not None:
        far = distance(node, trial, channel_vector(q, CHANNELS, x.shape[CHANNELS], 0.0))
        if far > max(FARTHEST.get(x.dtype, 0.0), offset(node, trial)):
            trial.refuse_shift(node, reasons.MEAN_TOO_FAR, distance=far)
    gain, ratio, moved, shift = vector(s, 1.0), vector(p, 1.0), vector(q, 0.0), vector(t, 0.0)
    if ratio is not None:
        moved = add(moved, (ratio - 1) * mean)
    if moved is not None:
        shift = add(shift, multiply(moved * weight / sigma, gain))
    _edit(node, trial, multiply(gain, ratio), gain, shift)


def _edit(node: Node, trial: Trial, gain: Tensor | None, bias_gain: Tensor | None, shift: Tensor | None) -> None:
    for name, unit in (("weight", Unit(gain)), ("bias", Unit(bias_gain, shift))):
        value = node.argument(name)
        if value is not None:
            trial.edit(node, value, unit)
        elif name == "weight" and gain is not None:
            trial.refuse(node, reasons.NO_WEIGHT)
        elif shift is not None:
            trial.refuse_shift(node, reasons.NO_BIAS)


@rule("layer_norm", "group_norm", "instance_norm", "rms_norm")
def norm_of_input(node: Node, trial: Trial) -> None:
    """Absorbs any units of its output along the axes of its weight.

    Its statistics come from its input, which stays as it is.
    """
    x, y = node.inputs[0], node.outputs[0]
    forbid(node, trial, [x], reasons.STATISTICS_OF_INPUT)
    unit = trial.unit_or_identity(y)
    if not unit.axes() <= set(_parameter_axes(node)):
        trial.refuse_unit(node, unit, reasons.GAIN_HAS_NO_AXIS)


@absorber("layer_norm", "group_norm", "instance_norm", "rms_norm")
def absorb_output(node: Node, trial: Trial) -> None:
    y = node.outputs[0]
    unit = trial.unit_or_identity(y)
    if unit.is_identity:
        _edit(node, trial, None, None, None)
        return
    axes = _parameter_axes(node)
    shape = [y.shape[axis] for axis in axes]

    def on_parameter(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        squeezed = tensor.reshape([tensor.shape[axis] for axis in axes])
        return squeezed.expand(shape)

    s, t = unit.direct()
    _edit(node, trial, on_parameter(s), on_parameter(s), on_parameter(t))


def _parameter_axes(node: Node) -> list[int]:
    """The axes of the output along which the gain and bias vary."""
    if "normalized_shape" in node.bound:
        rank = len(node.outputs[0].shape)
        return list(range(rank - len(node.bound["normalized_shape"]), rank))
    return [CHANNELS]
