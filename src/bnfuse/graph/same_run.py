"""Whether two calls of a model ran the same operators in the same way, so that the second one teaches nothing.

Sizes may differ, as long as no rule can tell: where an axis has size 1 in the first run but not in the second, where
axes of fixed and of changed size become one axis, where a number differs, it is not certain that two runs are the same.
Both are then solved together, which only takes longer.
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
) -> Counterparts | None:
    """The values of a run by those of another run, which ran the same operators or those that the first begins with.

    Args:
        nodes, inputs: operators of the first run, and the values of what it was given.
        other_nodes, other_inputs: of the other.
        before: values of earlier calls which count as the same, by those that the other run may read.

    Returns:
        None if the operators are not the same.
    """
    if len(other_inputs) != len(inputs):
        return None
    steps, other_steps = ([node for node in run if _depends(node)] for run in (nodes, other_nodes))
    if len(other_steps) > len(steps):
        return None
    found = Counterparts(dict(before or {}))
    if not found.match(inputs, other_inputs):
        return None
    for node, other in zip(steps, other_steps, strict=False):
        if not found.add(node, other):
            return None
    found.whole = len(other_steps) == len(steps)
    return found


def _depends(node: Node) -> bool:
    """True if an operator reads or makes something that depends on the input; what it needs else is compared there."""
    return any(not value.independent for value in (*node.inputs, *node.outputs)) or bool(node.written)


_DEEPEST = 100
"""So many operators that make a weight or a table, one after the other, are compared."""


class Counterparts:
    """Two runs of the same operators.

    Attributes:
        same: the values of the first run by those of the other.
        certain: False if sizes or numbers differ in a way that a rule might tell.
        numbers: False if a number differs that is no size of what the operator reads or makes.
        whole: False if the other run ends before the first.
    """

    def __init__(self, same: dict[Value, Value]) -> None:
        self.same = same
        self.certain = self.numbers = self.whole = True

    def gives(self, values: Sequence[Value], others: Sequence[Value]) -> bool:
        """True if these values are the counterparts of the others."""
        return len(values) == len(others) and all(
            self.same.get(other, other) is value for value, other in zip(values, others, strict=True)
        )

    def match(self, values: Sequence[Value], others: Sequence[Value]) -> bool:
        """Note counterparts; False if they are of other kinds."""
        for value, other in zip(values, others, strict=True):
            if value.dtype != other.dtype or len(value.shape) != len(other.shape):
                return False
            self.certain &= _alike(value, other)
            self.same[other] = value
        return True

    def add(self, node: Node, other: Node, depth: int = 0) -> bool:
        """Note the results of two operators as counterparts, if the operators are the same."""
        if node.overload is not other.overload or node.call.module is not other.call.module:
            return False
        if len(node.outputs) != len(other.outputs):
            return False
        if node.call.plain is not other.call.plain and node.call.path:  # the model itself may be called by a method
            return False
        if len(node.inputs) != len(other.inputs) or node.bound.keys() != other.bound.keys():
            return False
        for value, counterpart in zip(node.inputs, other.inputs, strict=True):
            if not self._are(value, counterpart, depth):
                return False
        if not self.match(node.outputs, other.outputs):
            return False
        if node.operator in _REGROUPING:
            self.certain &= _same_groups(node, other)
        elif node.operator == "sum":
            self.certain &= _same_count(node, other)
        else:
            for name, value in node.bound.items():
                if not _same_argument(value, other.bound[name]):
                    self.certain = False
                    self.numbers &= _are_sizes(value, other.bound[name], node, other)
        self.certain &= not _may_read_a_missing_parameter(node, other)
        return True

    def _are(self, value: Value, other: Value, depth: int) -> bool:
        known = self.same.get(other)
        if known is not None or value is other:
            return known is value or value is other
        if value.producer is None or other.producer is None or not value.independent or depth == _DEEPEST:
            return _same_constant(value, other)
        return other.independent and self.add(value.producer, other.producer, depth + 1)


def _same_constant(value: Value, other: Value) -> bool:
    if value.kind is not Kind.CONSTANT or other.kind is not Kind.CONSTANT or value.shape != other.shape:
        return False
    assert value.tensor is not None
    assert other.tensor is not None
    if value.dtype != other.dtype or value.independent is not other.independent:
        return False
    dense = value.tensor.layout == other.tensor.layout == torch.strided
    return dense and torch.equal(value.tensor, other.tensor)


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


def _are_sizes(argument: Any, there: Any, node: Node, other: Node) -> bool:
    """True if arguments that differ are sizes of what the operators read or make, of the same axes."""
    if isinstance(argument, (list, tuple)) and isinstance(there, (list, tuple)) and len(argument) == len(there):
        pairs = list(zip(argument, there, strict=True))
    else:
        pairs = [(argument, there)]
    if not all(type(a) is type(b) is int for a, b in pairs):
        return False
    tensors = zip((*node.inputs, *node.outputs), (*other.inputs, *other.outputs), strict=True)
    sizes = {pair for value, counterpart in tensors for pair in zip(value.shape, counterpart.shape, strict=True)}
    return all(a == b or (a, b) in sizes for a, b in pairs)


def _alike(value: Value, other: Value) -> bool:
    """True if no rule can tell the two apart by their sizes."""
    if value.shape == other.shape:
        return True
    if value.independent or other.independent:
        return False
    return all(a == b or a > 1 for a, b in zip(value.shape, other.shape, strict=True))


def _same_count(node: Node, other: Node) -> bool:
    """True if as many elements are added up, along the same axes."""
    ratio = node.inputs[0].elements * other.outputs[0].elements == other.inputs[0].elements * node.outputs[0].elements
    return ratio and all(_same_argument(value, other.bound[name]) for name, value in node.bound.items())


def _may_read_a_missing_parameter(node: Node, other: Node) -> bool:
    """True if a forward that PyTorch does not know was given other sizes, and would have another parameter to read."""
    if node.call.is_standard or [value.shape for value in node.inputs] == [value.shape for value in other.inputs]:
        return False
    return any(parameter is None for parameter in node.call.module._parameters.values())


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
