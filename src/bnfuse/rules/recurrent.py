r"""Recurrent layers.

A recurrent layer reads its input through ``W_ih*x + b_ih`` in its first layer, one for each direction; with
``x_old = p*x_new + q`` that is ``(W_ih*p)*x_new + (b_ih + W_ih*q)``. Its output comes from a saturating function, which
neither a scale nor a shift passes.

A packed sequence holds the steps of a padded one that are no padding, one after the other: (batch, steps, ...) becomes
(elements, ...), so units pass that are the same for all samples and steps.
"""

from __future__ import annotations

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Trial, absorber, forbid, link, rule
from bnfuse.units import IDENTITY, Unit, channel_vector

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@rule(*_RECURRENT)
def recurrent(node: Node, trial: Trial) -> None:
    """Absorbs any units of the features of its input; a shift needs biases.

    ``W_ih*x + b_ih`` is linear; what follows saturates, so states and outputs stay as they are.
    """
    if "params" not in node.bound:
        refuse_all(node, trial)
        return
    x = node.inputs[0]
    unit = trial.unit_or_identity(x)
    if not unit.uniform_outside(len(x.shape) - 1):
        trial.refuse_unit(node, unit, reasons.COLUMN_PER_FEATURE)
    parameters = set(node.bound["params"])
    for value in (*node.inputs[1:], *node.outputs):
        if value not in parameters and not trial.unit_or_identity(value).is_identity:
            trial.refuse(node, reasons.STATE_IS_FIXED)


def refuse_all(node: Node, trial: Trial) -> None:
    forbid(node, trial, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES)


@absorber(*_RECURRENT)
def absorb_recurrent(node: Node, trial: Trial) -> None:
    x = node.inputs[0]
    unit = trial.unit_or_identity(x)
    if "params" not in node.bound:
        return
    p, q = unit.inverted()
    features = x.shape[-1]
    edits = dict.fromkeys(node.bound["params"], IDENTITY)
    for weight, bias in _first_layer(node):
        if p is not None:
            edits[weight] = Unit(channel_vector(p, -1, features, 1.0).reshape(1, -1))  # (gates, features)
        if q is not None:
            if bias is None:
                trial.refuse_shift(node, reasons.RECURRENT_WITHOUT_BIAS)
            edits[bias] = Unit(None, trial.content(weight) @ channel_vector(q, -1, features, 0.0))
    for value, edit in edits.items():
        trial.edit(node, value, edit)


def _first_layer(node: Node) -> list[tuple[Value, Value | None]]:
    """(weight_ih, bias_ih) of the first layer, for each direction."""
    parameters: tuple[Value, ...] = node.bound["params"]
    biases = bool(node.argument("has_biases"))
    directions = 2 if node.argument("bidirectional") else 1
    each = len(parameters) // (directions * node.argument("num_layers", 1))
    return [(parameters[i * each], parameters[i * each + 2] if biases else None) for i in range(directions)]


@rule("_pack_padded_sequence")
def pack(node: Node, trial: Trial) -> None:
    """Units that are the same for all samples and steps; what is padding goes, whatever its units."""
    _link_packed(node, trial, node.inputs[0], node.outputs[0])


@rule("_pad_packed_sequence")
def pad(node: Node, trial: Trial) -> None:
    """Units that are the same for all samples and steps, and that leave the number it pads with as it is."""
    packed, padded = node.inputs[0], node.outputs[0]
    number = float(node.bound["padding_value"])
    for unit in (trial.unit(packed), trial.unit(padded)):
        if unit is not None and unit.shift is not None:
            trial.refuse_shift(node, reasons.PADS_WITH_A_NUMBER)
        if unit is not None and unit.scale is not None and number != 0:
            trial.refuse(node, reasons.PADS_WITH, number=number)
    _link_packed(node, trial, padded, packed)


def _link_packed(node: Node, trial: Trial, padded: Value, packed: Value) -> None:
    def to_packed(unit: Unit) -> Unit:
        if unit.axes() & {0, 1}:
            trial.refuse_unit(node, unit, reasons.INDEXED_BY_TENSOR)
        return unit.map(lambda tensor: tensor.squeeze(0))

    def to_padded(unit: Unit) -> Unit:
        if 0 in unit.axes():
            trial.refuse_unit(node, unit, reasons.INDEXED_BY_TENSOR)
        return unit.map(lambda tensor: tensor.unsqueeze(0))

    link(trial, padded, packed, to_packed, to_padded)
