r"""Recurrent layers.

A recurrent layer reads its input through ``W_ih*x + b_ih`` in its first layer, one for each direction; with
``x_old = p*x_new + q`` that is ``(W_ih*p)*x_new + (b_ih + W_ih*q)``. Its output comes from a saturating function, which
neither a scale nor a shift passes.
"""

from __future__ import annotations

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Trial, absorber, forbid, rule
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
