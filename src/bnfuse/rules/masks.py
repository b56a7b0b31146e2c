r"""Elements that do not matter, since the same mask replaces them again.

In ``n(x.masked_fill(k, 0)).masked_fill(k, 0)`` nobody sees what the norm makes of the zeros that the first mask put in.
So units pass the first mask, a shift too: the zeros stay zeros where they would have to become ``c``, and the second
mask writes over them. Between the two lie only operators that work on each element by itself, and nothing else reads
what they make.

The masks must surely hold the same: they are one tensor, or made of one by operators whose arguments say nothing of its
size or contents. A mask that is multiplied by must surely hold zeros and ones: it is a tensor of booleans, another
dtype of one, or ``1 - mask``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Trial

_CASTS = ("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "lift_fresh")
_TURNS = ("squeeze", "unsqueeze", "transpose", "permute")
_MOVES = ("view", "reshape", "flatten", "unflatten", "slice", "select")
_EXPANSIONS = ("expand", "expand_as", "broadcast_to")
_PLACES = {*_TURNS, *_MOVES}
_SEEN_THROUGH = {*_CASTS, *_TURNS, *_MOVES, *_EXPANSIONS, "logical_not", "bitwise_not", "rsub", "eq", "ne"}
_COMPARISONS = ("eq", "ne", "gt", "ge", "lt", "le")
_LOGICAL = ("logical_not", "bitwise_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "rsub")
_ELEMENTWISE = {
    "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "silu", "gelu", "sigmoid", "tanh", "hardswish", "mish",
    "hardsigmoid", "hardtanh", "elu", "celu", "selu", "softplus", "clamp", "clamp_min", "clamp_max", "abs", "neg",
    "sin", "cos", "erf", "dropout", "feature_dropout", "batch_norm", "add", "sub", "rsub", "mul", "div", "maximum",
    "minimum", "masked_fill", "where", *_CASTS,
}  # fmt: skip
"""Operators of each element by itself, which are finite wherever their operands are: 0 times infinity is no 0."""

_MOST_READERS = 200
_MOST_STEPS = 32
"""Operators that are looked at behind a mask, and before one."""


@dataclass(frozen=True)
class Mask:
    """Zeros and ones, or booleans.

    Attributes:
        expression: equal for two masks only if they hold the same, but for the negation.
        negated: True if it is 1 where the expression is 0.
        compared: the operators in it that are given a number.
    """

    expression: Hashable
    negated: bool = False
    compared: frozenset[Node] = field(default=frozenset(), compare=False)

    def __invert__(self) -> Mask:
        return Mask(self.expression, not self.negated, self.compared)


def mask_of(value: Any) -> Mask | None:
    """What a tensor holds once it is broadcast, if it holds nothing but zeros and ones for sure; else None."""
    return _mask_of(value, _MOST_STEPS, True) if isinstance(value, Value) else None


def _mask_of(value: Value, steps: int, is_broadcast: bool) -> Mask | None:
    node = value.producer
    whole = Mask(value) if value.dtype is torch.bool else None
    if node is None or not node.inputs or node.written or not steps:
        return whole
    name, x = node.operator, node.inputs[0]
    inner = _mask_of(x, steps - 1, is_broadcast and name not in _PLACES) if name in _SEEN_THROUGH else None
    if inner is not None:
        if name in _CASTS or (name in _EXPANSIONS and is_broadcast):
            return inner
        if name in _TURNS:
            axes = tuple((key, str(given)) for key, given in node.bound.items() if given is not x)
            return Mask((node.overload, axes, inner.expression), inner.negated, inner.compared)
        if name in (*_MOVES, *_EXPANSIONS):
            return Mask(value)
        negates = _negates(node, x)
        if negates is not None:
            return ~inner if negates else inner
    compared: set[Node] = set()
    expression = _key(value, steps, compared) if whole else None
    return Mask(expression, compared=frozenset(compared)) if whole else None


def _negates(node: Node, x: Value) -> bool | None:
    """Whether an operator turns zeros into ones and ones into zeros; None if it does something else."""
    name, number = node.operator, node.argument("other")
    if name == "logical_not" or (name == "bitwise_not" and x.dtype is torch.bool):
        return True
    if isinstance(number, Value) or number not in (0, 1):
        return None
    if name == "rsub":
        return True if number == 1 and node.argument("alpha", 1) == 1 else None
    return (number == 0) == (name == "eq") if name in ("eq", "ne") else None


def _key(value: Value, steps: int, compared: set[Node]) -> Hashable:
    """Equal for two tensors only if they hold the same."""
    node = value.producer
    if node is None or node.written or not steps or node.operator not in (*_TURNS, *_COMPARISONS, *_LOGICAL, *_CASTS):
        return value
    arguments: list[Hashable] = []
    for name, given in sorted(node.bound.items()):
        if isinstance(given, Value):
            arguments.append((name, _key(given, steps - 1, compared)))
            continue
        if node.operator in (*_COMPARISONS, *_LOGICAL):
            if given not in (0, 1):
                return value  # a threshold may be made of a size, or of the contents of a tensor
            compared.add(node)
        arguments.append((name, str(given)))
    return node.overload, *arguments


def is_written_over(value: Value, mask: Mask | None, trial: Trial) -> bool:
    """True if nothing depends on the elements of a tensor at the places of a mask."""
    if mask is None:
        return False
    compared: set[Node] = set()
    waiting, seen = [value], {value}
    while waiting:
        value = waiting.pop()
        kept = value.tensor is not None  # a parameter that is written to, which the next run reads
        if value.pinned is not None or kept or len(seen) > _MOST_READERS:
            return False
        for node in value.consumers:
            if len(node.outputs) != 1 or node.outputs[0].shape != value.shape:
                return False
            replaced = _replaced(node, value)
            if replaced == mask:
                compared |= mask.compared ^ replaced.compared if replaced is not None else set()
                continue
            if not _is_elementwise(node, value):
                return False
            if node.outputs[0] not in seen:
                waiting.append(node.outputs[0])
                seen.add(node.outputs[0])
    for node in compared:
        trial.assume(node)
    return True


def filled(node: Node) -> Mask | None:
    """The places that ``masked_fill`` or ``x[mask] = number`` fills, None if they are not known."""
    if node.operator == "masked_fill":
        return mask_of(node.bound["mask"])
    if len(node.bound["indices"]) != 1 or node.argument("accumulate"):
        return None
    [index] = node.bound["indices"]
    if not isinstance(index, Value) or index.dtype is not torch.bool:
        return None
    whole = len(index.shape) == len(node.bound["self"].shape)
    mask = _mask_of(index, _MOST_STEPS, whole)
    if mask is None or whole:
        return mask
    return Mask(
        ("first axes", mask.expression), mask.negated, mask.compared
    )  # where a mask is broadcast otherwise, it has the last


def _replaced(node: Node, value: Value) -> Mask | None:
    """The places at which an operator puts something else for the elements of its operand; None if it does not."""
    if node.inputs.count(value) > 1:
        return None
    if node.operator in ("masked_fill", "index_put") and node.bound["self"] is value:
        return filled(node)
    if node.operator == "where" and value is not node.bound["condition"]:
        mask = mask_of(node.bound["condition"])
        return ~mask if mask is not None and value is node.argument("self") else mask
    if node.operator == "mul":
        kept = mask_of(node.bound["other" if node.bound["self"] is value else "self"])
        return None if kept is None else ~kept
    return None


def _is_elementwise(node: Node, value: Value) -> bool:
    if node.operator == "div":
        return node.bound["self"] is value and node.inputs.count(value) == 1
    return node.operator in _ELEMENTWISE and not (node.operator == "batch_norm" and node.argument("training"))
