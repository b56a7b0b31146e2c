r"""Convolutions, transposed convolutions, linear layers and products with a matrix: where units are absorbed.

With ``y = w*x + b``, new units ``x_old = p*x_new + q`` and ``y_new = s*y_old + t`` (all per channel),

    y_new = s*(w*(p*x_new + q) + b) + t
          = (s*w*p)*x_new + (s*b + t + s*(w*q)).

So the weight takes ``s`` along its output axis and ``p`` along its input axis, and the bias takes the rest. ``w*q``
of a constant ``q`` is the same at every position only if no zero padding meets it, since the padding stays 0 where it
would have to become ``-q/p``; and for a transposed convolution only if every output has the same taps. A dead channel
(``s`` or ``p`` equal to 0) is absorbed like any other; nothing is inverted here unless the demand came from the other
direction.

An operator that has no bias passes the rest on: its output takes the inverse shift ``w*q``.

Weight axes: convolution (out, in/groups, *kernel); transposed (in, out/groups, *kernel); linear (out, in);
``x @ w`` (in, out).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.rules import einsum
from bnfuse.rules.attention import is_softmax, mix_rows
from bnfuse.rules.registry import Trial, absorber, forbid, rule
from bnfuse.units import Unit, add, channel_vector, multiply, per_channel

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_DEFORMED = "torchvision::deform_conv2d"
_MATRIX = ("matmul", "mm", "addmm")
UNDEFORMED = ("linear", *_CONVOLUTIONS, *_TRANSPOSED, *_MATRIX)
LAYERS = (*UNDEFORMED, _DEFORMED)


@dataclass(eq=False, slots=True)  # not frozen, since thousands are made; nothing writes to one
class Layer:
    """The parts of a layer that the algebra needs."""

    x: Value
    y: Value
    w: Value
    b: Value | None
    axis: int  # of the channels, in x and y
    groups: int
    transposed: bool  # the weight has the input axis first
    uniform: bool  # a constant input gives a constant output, so that shifts pass
    factor: float = 1.0  # of the product, before the bias is added

    @property
    def channels_in(self) -> int:
        return self.x.shape[self.axis]

    @property
    def channels_out(self) -> int:
        return self.y.shape[self.axis]


def layer_of(node: Node) -> Layer | None:
    """The layer that a node is; None for a product of matrices in which no factor is a weight of fixed size."""
    y = node.outputs[0]
    if node.operator in _MATRIX:
        return _matrix_layer(node, y)
    x, w, b = node.bound["input"], node.bound["weight"], node.argument("bias")
    if node.operator == "linear":
        if len(w.shape) != 2:
            return None
        return Layer(x, y, w, b, len(x.shape) - 1, 1, False, True)
    if node.operator == _DEFORMED:  # samples zeros outside of the image
        return Layer(x, y, w, b, 1, x.shape[1] // w.shape[1], False, False)
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
    return Layer(x, y, w, b, len(x.shape) - spatial - 1, node.argument("groups", 1), transposed, uniform)


def _matrix_layer(node: Node, y: Value) -> Layer | None:
    if node.operator == "addmm":
        b, x, w = node.bound["self"], node.bound["mat1"], node.bound["mat2"]
        if node.argument("beta", 1) != 1 or b.shape not in ((y.shape[-1],), (1, y.shape[-1])):
            return None
    else:
        x, w = node.bound["self"], node.bound["mat2" if node.operator == "mm" else "other"]
        b = None
    if not w.independent or x.independent or len(w.shape) != 2 or len(x.shape) < 2:
        return None
    return Layer(x, y, w, b, len(x.shape) - 1, 1, True, True, float(node.argument("alpha", 1)))


def _any(numbers: int | list[int], besides: int = 0) -> bool:
    return any(number != besides for number in ([numbers] if isinstance(numbers, int) else numbers))


def _layer_or_none(node: Node) -> Layer | None:
    return None if node.operator in ("bmm", "mv") else layer_of(node)


@rule(*LAYERS, "bmm", "mv")
def check(node: Node, trial: Trial) -> None:
    """Absorbs any units of the channels of its output, and any scale of the channels of its input.

    Linear layers and ``x @ w`` work on the last axis. A shift needs a bias, or a place for one. A shift of the
    input passes where every output has the same taps and none is a padded zero: padding 0 (or "same" with a kernel
    of size 1), for transposed convolutions kernels of size 1 with stride 1; in a forward of its own, at every input
    size. A deformable convolution samples zeros outside of the image, so it takes no shift of its input, and its
    offsets and mask stay as they are. ``addmm`` with ``beta`` 1 and one row of bias is a linear layer. A product
    with a parameter on the left, or along other axes, is a sum over letters as in ``einsum``. A product ``A @ v``
    of two tensors passes any units of the last axis of v, a shift only if A is a softmax along its last axis; A
    stays as it is.
    """
    layer = _layer_or_none(node)
    if layer is None:
        _product(node, trial)
        return
    for value, side in ((layer.x, "input"), (layer.y, "output")):
        unit = trial.unit_or_identity(value)
        if not unit.uniform_outside(layer.axis):
            axis = min(unit.axes() - {layer.axis})
            trial.refuse_unit(node, unit, reasons.WEIGHT_HAS_NO_AXIS, axis=axis, side=side)
    for value in node.inputs:
        others = (layer.x, layer.w, layer.b)
        if all(value is not other for other in others) and not trial.unit_or_identity(value).is_identity:
            trial.refuse(node, reasons.OFFSETS_ARE_FIXED)
    if len(layer.w.consumers) > 1:
        _share(node, trial, layer)
    of_x = trial.unit(layer.x)
    if of_x is not None and of_x.shift is not None:
        if not layer.uniform:
            why = reasons.DIFFERENT_TAPS if layer.transposed else reasons.PADS_WITH_ZEROS
            trial.refuse_shift(node, reasons.NO_SHIFT_OF_INPUT, why=why.reason())
        if not node.call.is_standard:
            trial.assume(node)  # that its own code pads nothing at another size either
        if layer.b is None:
            _pass_on(node, trial, layer, of_x)


def _share(node: Node, trial: Trial, layer: Layer) -> None:
    """Other uses of the weight take the same units, so that they ask for the same edit of it.

    Each hands them to the one before and the one after it, which hand them on: there may be thousands.
    """
    place = layer.w.consumers.index(node)
    for others in (reversed(layer.w.consumers[:place]), layer.w.consumers[place + 1 :]):
        there = next((use for other in others if (use := _same_use(node, layer, other))), None)
        if there is None:
            continue
        other, its = there
        for mine, theirs in ((layer.x, its.x), (layer.y, its.y)):
            unit = trial.unit(mine)
            if unit is not None and not unit.is_identity and len(mine.shape) == len(theirs.shape):
                trial.share(node, layer.w, other, theirs, unit)


def _same_use(node: Node, layer: Layer, other: Node) -> tuple[Node, Layer] | None:
    """Another operator as a layer of the same kind and weight, None if it is none."""
    there = _layer_or_none(other) if other.operator == node.operator else None
    return (other, there) if there is not None and there.w is layer.w and there.x is not layer.w else None


def _pass_on(node: Node, trial: Trial, layer: Layer, unit: Unit) -> None:
    """A shift of the input without a bias to take it up: the output is shifted."""
    _, q = unit.inverted()
    if q is None or trial.unit(layer.y) is not None:
        return  # the absorber sees whether the two fit
    carried = _carried(layer, trial, channel_vector(q, layer.axis, layer.channels_in, 0.0))
    trial.demand(layer.y, Unit.of(None, per_channel(carried, layer.axis, len(layer.y.shape)), inverse=True))


def _product(node: Node, trial: Trial) -> None:
    """``A @ v`` of two tensors that depend on the input, or with a matrix on the left."""
    a, v = node.inputs[0], node.inputs[-1]
    if _is_sum(node, trial):
        einsum.check(node, trial)
        return
    always = node.operator == "addmm" or einsum.operands(node) is None  # else units of other axes are absorbed
    if node.operator == "addmm" or a is v or len(v.shape) < 2 or len(a.shape) < 2:
        forbid(node, trial, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES, always)
        return
    forbid(node, trial, [a], reasons.LEFT_FACTOR, always)
    mix_rows(node, trial, v, node.outputs[0], is_softmax(a), {len(v.shape) - 2}, always)


def _is_sum(node: Node, trial: Trial) -> bool:
    """True if the product is with a matrix of parameters that has an axis for the units; a softmax passes more."""
    if node.operator == "addmm" or is_softmax(node.inputs[0]):
        return False
    parts = einsum.operands(node)
    return parts is not None and parts.absorbs(trial)


def _edit_right_factor(node: Node, trial: Trial) -> None:
    """A right factor that is a parameter takes the units that were asked of it as an operand."""
    v = node.inputs[-1]
    unit = trial.unit(v)
    if unit is not None and not unit.is_identity and v.producer is None:
        trial.edit(node, v, Unit(*unit.direct()))


@absorber(*LAYERS, "bmm", "mv")
def absorb(node: Node, trial: Trial) -> None:
    layer = _layer_or_none(node)
    if layer is None:
        if _is_sum(node, trial):
            einsum.absorb(node, trial)
        else:
            _edit_right_factor(node, trial)
        return
    x, y = trial.unit_or_identity(layer.x), trial.unit_or_identity(layer.y)
    (p, q), (s, t) = x.inverted(), y.direct()
    channels_in, channels_out = layer.channels_in, layer.channels_out
    axis_in = None if p is None else channel_vector(p, layer.axis, channels_in, 1.0)
    axis_out = None if s is None else channel_vector(s, layer.axis, channels_out, 1.0)
    scale = multiply(along_out(layer, axis_out), along_in(layer, axis_in))
    shift = None if t is None else channel_vector(t, layer.axis, channels_out, 0.0)
    if q is not None:
        carried = _carried(layer, trial, channel_vector(q, layer.axis, channels_in, 0.0))
        shift = add(shift, multiply(carried, axis_out))
    features_last = layer.axis == len(layer.x.shape) - 1
    if layer.b is None and shift is not None and features_last and is_softmax(layer.x):
        trial.edit(node, layer.w, Unit(scale, along_out(layer, shift)))  # rows that sum to one hand a shift of w on
        return
    trial.edit(node, layer.w, Unit(scale))
    if layer.b is None:
        if shift is not None and bool((shift.abs() > 1e-12 * _size(t, q)).any()):
            trial.refuse_shift(node, reasons.NO_BIAS)
    else:
        trial.edit(node, layer.b, Unit(axis_out if shift is not None or has_content(layer.b, trial) else None, shift))


def has_content(bias: Value, trial: Trial) -> bool:
    """False for a bias, or a part of one, that the layer was made without and that no accepted edit has created."""
    while bias.producer is not None and bias.producer.inputs:
        bias = bias.producer.inputs[0]
    return bias.kind is not Kind.ABSENT or trial.is_edited(bias)


def along_out(layer: Layer, vector: Tensor | None) -> Tensor | None:
    """A per-output-channel vector as a factor of the weight."""
    if vector is None:
        return None
    rest = len(layer.w.shape) - 2
    if not layer.transposed:
        return vector.reshape(-1, 1, *[1] * rest)  # (out, 1, ...)
    return _by_group(layer, vector, layer.channels_in).reshape(-1, layer.w.shape[1], *[1] * rest)


def along_in(layer: Layer, vector: Tensor | None) -> Tensor | None:
    """A per-input-channel vector as a factor of the weight."""
    if vector is None:
        return None
    rest = len(layer.w.shape) - 2
    if layer.transposed:
        return vector.reshape(-1, 1, *[1] * rest)  # (in, 1, ...)
    return _by_group(layer, vector, layer.channels_out).reshape(-1, layer.w.shape[1], *[1] * rest)


def _by_group(layer: Layer, vector: Tensor, rows: int) -> Tensor:
    """(channels,) of the grouped side -> (rows or 1, channels/groups): each row has the channels of its group."""
    if layer.groups == 1:
        return vector.reshape(1, -1)
    parts = vector.reshape(layer.groups, 1, -1)
    return parts.expand(-1, rows // layer.groups, -1).reshape(rows, -1)


def _carried(layer: Layer, trial: Trial, q: Tensor) -> Tensor:
    """``w*q``: what a constant input ``q`` (in,) adds to every output (out,)."""
    return layer.factor * trial.once((layer.w, layer.transposed, layer.groups), q, lambda: _weighted(layer, trial, q))


def _weighted(layer: Layer, trial: Trial, q: Tensor) -> Tensor:
    if layer.groups == 1 and not layer.transposed:
        return torch.cat([_taps(piece) @ q for piece in trial.pieces(layer.w)])
    taps = _taps(trial.content(layer.w))
    groups = layer.groups
    parts = taps.reshape(groups, taps.shape[0] // groups, taps.shape[1])  # groups, rows, columns
    if layer.transposed:
        parts = parts.transpose(1, 2)
    return torch.matmul(parts, q.reshape(groups, -1, 1)).reshape(-1)


def _taps(weight: Tensor) -> Tensor:
    """The sum over the kernel: rows, columns."""
    return weight.flatten(2).sum(2) if weight.dim() > 2 else weight


def _size(*shifts: Tensor | None) -> float:
    return max((float(shift.abs().max()) for shift in shifts if shift is not None), default=0.0)
