"""Embeddings: rows of a table are looked up, so units of the output are units of the table's columns.

With ``y = table[i]``, ``y_new = s*y + t`` is ``table' = s*table + t`` for s and t along the columns, whatever rows are
looked up. Units that differ between places in the sequence have no place in the table.

A bag adds up rows, or takes their mean or their maximum. A scale passes all three, but no negative one a maximum; a
shift passes a mean and a maximum of at least one row. An empty bag gives zeros, which take no shift.
"""

from __future__ import annotations

from bnfuse import reasons
from bnfuse.graph.graph import Node
from bnfuse.rules.registry import Trial, absorber, forbid, rule
from bnfuse.units import Unit, channel_vector


@rule("embedding")
def embedding(node: Node, trial: Trial) -> None:
    """Absorbs any units of the last axis of its output: a row of the table is an output."""
    unit = trial.unit_or_identity(node.outputs[0])
    if not unit.uniform_outside(len(node.outputs[0].shape) - 1):
        trial.refuse_unit(node, unit, reasons.ROW_PER_TOKEN)


@rule("embedding_bag")
def bag(node: Node, trial: Trial) -> None:
    """Absorbs a scale of the last axis of its output, for a maximum one that is not negative.

    A shift too for a mean or a maximum over the rows of a table of indices, none of them padding; with bags of any
    size (``offsets``) one may be empty. Weights of the samples stay as they are.
    """
    table, y = node.bound["weight"], node.outputs[0]
    forbid(node, trial, [value for value in node.inputs if value is not table], reasons.NOTHING_PASSES)
    unit = trial.unit_or_identity(y)
    if not unit.uniform_outside(1):
        trial.refuse_unit(node, unit, reasons.ROW_PER_TOKEN)
    mode = node.argument("mode", _SUM)
    if mode == _MAXIMUM and unit.scale is not None:
        if unit.has_negative_scale:
            trial.refuse(node, reasons.MAXIMUM_NEGATIVE_SCALE)
        used = any(value.consumers or value.pinned for value in node.outputs[1:])
        if used and bool((unit.scale == 0).any()):
            trial.refuse(node, reasons.POSITIONS_OF_MAXIMA)
    if unit.shift is not None and mode == _SUM:
        trial.refuse_shift(node, reasons.ADDED_ANY_NUMBER_OF_TIMES)
    if unit.shift is not None and not _holds_rows(node):
        trial.refuse_shift(node, reasons.NO_SHIFT_SINCE, why=reasons.EMPTY_BAG.reason())


_SUM, _MAXIMUM = 0, 2


def _holds_rows(node: Node) -> bool:
    """True if no bag is empty: PyTorch's own code has made bags of equal size, from a table of indices."""
    made = node.bound["offsets"].producer
    padding = node.argument("padding_idx")
    return (
        node.call.is_standard
        and made is not None
        and made.call is node.call
        and made.operator == "arange"
        and (padding is None or padding < 0)
        and not node.argument("include_last_offset")
        and made.argument("start", 0) == 0
        and made.argument("step", 1) > 0
        and made.argument("end") == node.bound["indices"].elements
    )


@absorber("embedding", "embedding_bag")
def absorb_embedding(node: Node, trial: Trial) -> None:
    y = node.outputs[0]
    scale, shift = trial.unit_or_identity(y).direct()
    width = y.shape[-1]
    row_scale = None if scale is None else channel_vector(scale, len(y.shape) - 1, width, 1.0).reshape(1, -1)
    row_shift = None if shift is None else channel_vector(shift, len(y.shape) - 1, width, 0.0).reshape(1, -1)
    trial.edit(node, node.bound["weight"], Unit(row_scale, row_shift))  # (tokens, width)
