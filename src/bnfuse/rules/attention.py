r"""Products of matrices, and attention.

``y = A @ v`` mixes the rows of v. A scale along the columns of v passes; a shift ``t`` becomes ``A @ t``, which is
``t`` again where the rows of A sum to one, as those of a softmax do. Where A or v is a parameter, the product is a
linear layer without bias: see :mod:`bnfuse.rules.layers`.
"""

from __future__ import annotations

import torch

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Family, Trial, forbid, link, rule
from bnfuse.units import Unit

_SEE_THROUGH = {
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "dropout",
    "expand",
    "reshape",
    "view",
    "_unsafe_view",
}


@rule("scaled_dot_product_attention")
def attention(node: Node, trial: Trial) -> None:
    """Any units of the last axis of its values: its rows sum to one.

    No shift with dropout, or with a mask that is made from the input or holds booleans or infinities, which may
    mask a whole row. Queries, keys and masks stay as they are.
    """
    v, y = node.bound["value"], node.outputs[0]
    mask = node.argument("attn_mask")
    averages = not node.argument("dropout_p", 0.0)
    if isinstance(mask, Value) and (not mask.independent or not mask.dtype.is_floating_point):
        averages = False  # a row that is masked as a whole gives zeros
    elif isinstance(mask, Value):
        averages = averages and bool(torch.isfinite(trial.content(mask)).all())
    for value in node.inputs:
        if value is not v and not trial.unit_or_identity(value).is_identity:
            trial.refuse(node, reasons.QUERY_KEY_OR_MASK)
    if node.inputs.count(v) > 1 and trial.unit(v) is not None:
        trial.refuse(node, reasons.VALUES_ARE_KEYS)
    repeated = bool(node.argument("enable_gqa")) and v.shape[-3] != y.shape[-3]
    mix_rows(node, trial, v, y, averages, {len(v.shape) - 2, *([len(v.shape) - 3] if repeated else [])})


@rule("softmax", family=Family.FIXED)
def fixed(node: Node, trial: Trial) -> None:
    """Nothing passes, but what a softmax makes is known to sum to one."""
    forbid(node, trial, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES)


def mix_rows(
    node: Node, trial: Trial, v: Value, y: Value, averages: bool, mixed: set[int], always: bool = True
) -> None:
    """Tie v and ``y = A @ v``: the units must be uniform along the mixed axes. ``always``: as in `link`."""
    if len(v.shape) != len(y.shape):
        forbid(node, trial, (v, y), reasons.DIFFERENT_RANKS, always)
        return

    def checked(unit: Unit) -> Unit:
        broadcast = {axis for axis in unit.axes() if v.shape[axis] != y.shape[axis]}
        if unit.axes() & mixed or broadcast:
            trial.refuse_unit(node, unit, reasons.MIXES_ELEMENTS)
        if unit.shift is not None and not averages:
            trial.refuse_shift(node, reasons.WEIGHTS_DO_NOT_SUM_TO_ONE)
        return unit

    link(trial, v, y, checked, checked, always)


def is_softmax(value: Value) -> bool:
    """True if the elements along the last axis sum to one."""
    node = value.producer
    while node is not None and node.operator in _SEE_THROUGH:
        if node.argument("train") or node.inputs[0].shape[-1] != value.shape[-1]:
            return False
        value, node = node.inputs[0], node.inputs[0].producer
    return node is not None and node.operator == "softmax" and node.argument("dim") in (-1, len(value.shape) - 1)
