"""Whether two calls of a model ran the same operators in the same way, so that the second one teaches nothing.

Sizes may differ, as long as no rule can tell: where an axis has size 1 in the first run but not in the second, where
axes of fixed and of changed size become one axis, where a number differs, two runs are not the same. When in doubt
they are not: both are then solved together, which only takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bnfuse.graph.graph import Kind, Node, Value

_REGROUPING = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "expand"})
"""Operators whose sizes follow from those of their input and output, which are compared as such."""


def counterparts(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    other_nodes: Sequence[Node],
    other_inputs: Sequence[Value],
    before: Mapping[Value, Value] | None = None,
) -> dict[Value, Value] | None:
    """The values of a run by those of another run, which is the same as the first or as the beginning of it.

    Args:
        nodes, inputs: operators of the first run, and the values of what it was given.
        other_nodes, other_inputs: of the other.
        before: values of earlier calls which count as the same, by those that the other run may read.

    Returns:
        None if the two are not the same.
    """
    if len(other_nodes) > len(nodes) or len(other_inputs) != len(inputs):
        return None
    same: dict[Value, Value] = dict(before or {})
    for value, other in zip(inputs, other_inputs, strict=True):
        if not _alike(value, other):
            return None
        same[other] = value
    for node, other_node in zip(nodes, other_nodes, strict=False):
        if not _same_node(node, other_node, same):
            return None
        same.update(zip(other_node.outputs, node.outputs, strict=True))
    return same


def _same_node(node: Node, other: Node, same: dict[Value, Value]) -> bool:
    if node.overload is not other.overload or node.call.module is not other.call.module:
        return False
    if node.call.plain is not other.call.plain or len(node.outputs) != len(other.outputs):
        return False
    if len(node.inputs) != len(other.inputs) or node.bound.keys() != other.bound.keys():
        return False
    for value, counterpart in zip(node.inputs, other.inputs, strict=True):
        if not (same.get(counterpart) is value or _same_leaf(value, counterpart)):
            return False
    if not all(map(_alike, node.outputs, other.outputs)):
        return False
    if node.operator in _REGROUPING:
        return _same_groups(node, other)
    return all(_same_argument(value, other.bound[name]) for name, value in node.bound.items())


def _same_leaf(value: Value, other: Value) -> bool:
    if value is other:
        return value.kind is not Kind.COMPUTED
    if value.kind is not Kind.CONSTANT or other.kind is not Kind.CONSTANT or value.shape != other.shape:
        return False
    assert value.tensor is not None
    assert other.tensor is not None
    if value.dtype != other.dtype or value.independent is not other.independent:
        return False
    return value.tensor.layout == torch.strided and torch.equal(value.tensor, other.tensor)


def _same_argument(argument: Any, other: Any) -> bool:
    if isinstance(argument, Value):
        return isinstance(other, Value)  # compared among the inputs
    if isinstance(argument, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(argument) == len(other)
            and all(map(_same_argument, argument, other))
        )
    return type(argument) is type(other) and (isinstance(argument, torch.Generator) or bool(argument == other))


def _alike(value: Value, other: Value) -> bool:
    """True if no rule can tell the two apart by themselves."""
    if value.dtype != other.dtype or len(value.shape) != len(other.shape):
        return False
    if value.shape == other.shape:
        return True
    if value.independent or other.independent:
        return False
    return all(a == b or a > 1 for a, b in zip(value.shape, other.shape, strict=True))


def _same_groups(node: Node, other: Node) -> bool:
    """True if the axes are taken apart and put together in the same way."""
    if not node.inputs or not node.outputs:
        return False
    given, made = node.inputs[0].shape, node.outputs[0].shape
    given_there, made_there = other.inputs[0].shape, other.outputs[0].shape
    if (given, made) == (given_there, made_there):
        return True
    if node.operator == "expand":
        return all((a == 1) == (b == 1) for a, b in zip(given, given_there, strict=True))
    for sources, targets in _groups(given, made):
        if _product(given_there, sources) != _product(made_there, targets):
            return False
        sources, targets = [i for i in sources if given[i] != 1], [i for i in targets if made[i] != 1]
        changed = [given[i] != given_there[i] for i in sources]
        if len(sources) > 1 and any(changed) and (len(targets) > 1 or not all(changed)):
            return False
    return True


def _groups(given: Sequence[int], made: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring axes that become one another."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(given) or j < len(made):
        sources, targets = [], []
        a = b = 1
        if i < len(given):
            sources, a, i = [i], given[i], i + 1
        if j < len(made):
            targets, b, j = [j], made[j], j + 1
        while a != b:
            if (a < b and i < len(given)) or j >= len(made):
                if i >= len(given):
                    break
                sources.append(i)
                a *= given[i]
                i += 1
            else:
                targets.append(j)
                b *= made[j]
                j += 1
        groups.append((sources, targets))
    return groups


def _product(shape: Sequence[int], axes: Sequence[int]) -> int:
    product = 1
    for axis in axes:
        product *= shape[axis]
    return product
