"""Embeddings: rows of a table are looked up, so units of the output are units of the table's columns.

With ``y = table[i]``, ``y_new = s*y + t`` is ``table' = s*table + t`` for s and t along the columns, whatever rows are
looked up. Units that differ between places in the sequence have no place in the table.
"""

from __future__ import annotations

from bnfuse.graph.graph import Node
from bnfuse.reasons import ROW_PER_TOKEN
from bnfuse.rules.registry import Trial, absorber, rule
from bnfuse.units import Unit, channel_vector


@rule("embedding")
def embedding(node: Node, trial: Trial) -> None:
    """Absorbs any units of the last axis of its output: a row of the table is an output."""
    unit = trial.unit_or_identity(node.outputs[0])
    if not unit.uniform_outside(len(node.outputs[0].shape) - 1):
        trial.refuse_unit(node, unit, ROW_PER_TOKEN)


@absorber("embedding")
def absorb_embedding(node: Node, trial: Trial) -> None:
    y = node.outputs[0]
    scale, shift = trial.unit_or_identity(y).direct()
    width = y.shape[-1]
    row_scale = None if scale is None else channel_vector(scale, len(y.shape) - 1, width, 1.0).reshape(1, -1)
    row_shift = None if shift is None else channel_vector(shift, len(y.shape) - 1, width, 0.0).reshape(1, -1)
    trial.edit(node, node.bound["weight"], Unit(row_scale, row_shift))  # (tokens, width)
