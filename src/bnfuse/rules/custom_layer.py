"""Layers of the caller's own, which a handler looks after.

The layer is one operator, and the handler makes it give ``s*y + t`` where it gave y: any scale and shift of the output
along axis 1. What the layer does inside is not known, so the units of its input stay as they are.
"""

from __future__ import annotations

from bnfuse.graph.graph import Node
from bnfuse.reasons import HANDLER_PER_CHANNEL, HANDLER_TAKES_NO_INPUT_UNITS
from bnfuse.rules.registry import Trial, absorber, forbid, rule
from bnfuse.units import Unit, channel_vector


@rule("handled")
def handled_layer(node: Node, trial: Trial) -> None:
    """A layer with a handler of yours: absorbs any units of the channels of its output, on axis 1.

    Its input stays as it is.
    """
    forbid(node, trial, node.inputs, HANDLER_TAKES_NO_INPUT_UNITS)
    unit = trial.unit_or_identity(node.outputs[0])
    if not unit.uniform_outside(1):
        trial.refuse_unit(node, unit, HANDLER_PER_CHANNEL)


@absorber("handled")
def absorb_handled(node: Node, trial: Trial) -> None:
    layer = node.bound["layer"]
    scale, shift = trial.unit_or_identity(node.outputs[0]).direct()
    (channels,) = layer.shape
    trial.edit(
        node,
        layer,
        Unit(
            None if scale is None else channel_vector(scale, 1, channels, 1.0),
            None if shift is None else channel_vector(shift, 1, channels, 0.0),
        ),
    )
