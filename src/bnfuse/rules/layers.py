r"""Convolutions, transposed convolutions and linear layers: where units are absorbed.

With ``y = w*x + b``, new units ``x_old = p*x_new + q`` and ``y_new = s*y_old + t`` (all per channel),

    y_new = s*(w*(p*x_new + q) + b) + t
          = (s*w*p)*x_new + (s*b + t + s*(w*q)).

So the weight takes ``s`` along its output axis and ``p`` along its input axis, and the bias takes the rest. ``w*q``
of a constant ``q`` is the same at every position only if no zero padding meets it, since the padding stays 0 where it
would have to become ``-q/p``; and for a transposed convolution only if every output has the same taps. A dead channel
(``s`` or ``p`` equal to 0) is absorbed like any other; nothing is inverted here unless the demand came from the other
direction.

Weight axes: convolution (out, in/groups, *kernel); transposed (in, out/groups, *kernel); linear (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnfuse.graph import Kind, Node, Value
from bnfuse.rules import Trial, absorber, rule
from bnfuse.units import IDENTITY, NotInvertibleError, Unit, add, channel_vector, multiply

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}


@dataclass(frozen=True)
class _Layer:
    """The parts of a layer that the algebra needs."""

    x: Value
    y: Value
    w: Value
    b: Value | None
    axis: int  # of the channels, in x and y
    groups: int
    transposed: bool
    uniform: bool  # a constant input gives a constant output, so that shifts pass

    @property
    def channels_in(self) -> int:
        return self.x.shape[self.axis]

    @property
    def channels_out(self) -> int:
        return self.y.shape[self.axis]


def _layer(node: Node) -> _Layer:
    x, w, b = node.bound["input"], node.bound["weight"], node.argument("bias")
    y = node.outputs[0]
    if node.operator == "linear":
        return _Layer(x, y, w, b, len(x.shape) - 1, 1, False, True)
    transposed = node.operator in _TRANSPOSED
    spatial = (_TRANSPOSED if transposed else _CONVOLUTIONS)[node.operator]
    pointwise = all(size == 1 for size in w.shape[2:])
    padding = node.argument("padding", 0)
    padded = not pointwise if padding == "same" else padding != "valid" and _any(padding)
    if transposed:
        uniform = pointwise and not padded and not _any(node.argument("output_padding", 0))
        uniform = uniform and not _any(node.argument("stride", 1), besides=1)
    else:
        uniform = not padded
    return _Layer(x, y, w, b, len(x.shape) - spatial - 1, node.argument("groups", 1), transposed, uniform)


def _any(numbers: int | list[int], besides: int = 0) -> bool:
    return any(number != besides for number in ([numbers] if isinstance(numbers, int) else numbers))


@rule("linear", *_CONVOLUTIONS, *_TRANSPOSED)
def check(node: Node, trial: Trial) -> None:
    layer = _layer(node)
    for value, side in ((layer.x, "input"), (layer.y, "output")):
        unit = trial.unit(value) or IDENTITY
        if not unit.uniform_outside(layer.axis):
            trial.refuse(node, f"its weight has no axis for units that vary along axis {_other(unit, layer.axis)} of its {side}", scale=unit.scale is not None)
    unit = trial.unit(layer.x)
    if unit is not None and unit.shift is not None and not layer.uniform:
        what = "not every output has the same taps" if layer.transposed else "it pads with zeros, which would not be shifted"
        trial.refuse(node, f"it takes no shift of its input: {what}")


def _other(unit: Unit, axis: int) -> int:
    return min(unit.axes() - {axis})


@absorber("linear", *_CONVOLUTIONS, *_TRANSPOSED)
def absorb(node: Node, trial: Trial) -> None:
    layer = _layer(node)
    x, y = trial.unit(layer.x) or IDENTITY, trial.unit(layer.y) or IDENTITY
    try:
        (p, q), (s, t) = x.inverted(), y.direct()
    except NotInvertibleError:
        trial.refuse(node, "it would have to undo a scale of (nearly) 0", scale=True)
    channels_in, channels_out = layer.channels_in, layer.channels_out
    axis_in = None if p is None else channel_vector(p, layer.axis, channels_in, 1.0)
    axis_out = None if s is None else channel_vector(s, layer.axis, channels_out, 1.0)
    scale = multiply(_along_out(layer, axis_out), _along_in(layer, axis_in))
    if scale is not None:
        trial.edit(node, layer.w, Unit(scale))
    shift = None if t is None else channel_vector(t, layer.axis, channels_out, 0.0)
    if q is not None:
        carried = _carried(layer, trial.content(layer.w), channel_vector(q, layer.axis, channels_in, 0.0))
        shift = add(shift, multiply(carried, axis_out))
    if layer.b is None:
        if shift is not None:
            trial.refuse(node, "it has no bias to take up a shift, and none can be added")
    elif shift is not None or (axis_out is not None and _has_content(layer.b, trial)):
        trial.edit(node, layer.b, Unit(axis_out, shift))


def _has_content(bias: Value, trial: Trial) -> bool:
    return bias.kind is not Kind.ABSENT or trial.is_edited(bias)


def _along_out(layer: _Layer, vector: Tensor | None) -> Tensor | None:
    """A per-output-channel vector as a factor of the weight."""
    if vector is None:
        return None
    rest = len(layer.w.shape) - 2
    if not layer.transposed:
        return vector.reshape(-1, 1, *[1] * rest)  # (out, 1, ...)
    return _by_group(layer, vector, layer.channels_in).reshape(-1, layer.w.shape[1], *[1] * rest)


def _along_in(layer: _Layer, vector: Tensor | None) -> Tensor | None:
    """A per-input-channel vector as a factor of the weight."""
    if vector is None:
        return None
    rest = len(layer.w.shape) - 2
    if layer.transposed:
        return vector.reshape(-1, 1, *[1] * rest)  # (in, 1, ...)
    return _by_group(layer, vector, layer.channels_out).reshape(-1, layer.w.shape[1], *[1] * rest)


def _by_group(layer: _Layer, vector: Tensor, rows: int) -> Tensor:
    """(channels,) of the grouped side -> (rows or 1, channels/groups): each row has the channels of its group."""
    if layer.groups == 1:
        return vector.reshape(1, -1)
    parts = vector.reshape(layer.groups, 1, -1)
    return parts.expand(-1, rows // layer.groups, -1).reshape(rows, -1)


def _carried(layer: _Layer, weight: Tensor, q: Tensor) -> Tensor:
    """``w*q``: what a constant input ``q`` (in,) adds to every output (out,)."""
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # rows, columns
    groups = layer.groups
    parts = taps.reshape(groups, taps.shape[0] // groups, taps.shape[1])  # groups, rows, columns
    if layer.transposed:
        parts = parts.transpose(1, 2)
    return torch.matmul(parts, q.reshape(groups, -1, 1)).reshape(-1)
