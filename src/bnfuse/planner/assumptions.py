"""What a solution takes for granted, and what shows whether it holds. Most plans need nothing.

*Numbers.* ``x / 2`` passes a shift by halving it. Were the number ``x.shape[-1]``, the plan would hold at one size
only. So operators whose numbers are others in another call are told apart.

*Work in place.* Without the norm before it, an activation that works in place may overwrite a tensor that is still
read, so it is to work out of place. That changes nothing where its caller uses what it returns, and everything where
the caller counts on the tensor being changed. Runs with the setting switched off tell: they must read the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bnfuse.capture.run import Recording, Run
from bnfuse.graph.graph import Graph, Kind, Node, Value


def varying(runs: Sequence[Run]) -> set[Node]:
    """The operators whose numbers are others than in the first run of the same method.

    Where a module ran an operator more often than in the first run it is not known which of them belong together.
    """
    different: set[Node] = set()
    first: dict[str, dict[tuple[str | None, str], list[Node]]] = {}
    for run in runs:
        places = _by_place(run.nodes)
        there = first.setdefault(run.call.method, places)
        for place, nodes in places.items():
            others = there.get(place, ())
            if there is not places and len(others) == len(nodes):
                for pair in zip(nodes, others, strict=True):
                    if not _same_numbers(*pair):
                        different.update(pair)
    return different


def _by_place(nodes: Sequence[Node]) -> dict[tuple[str | None, str], list[Node]]:
    """The operators by the module that ran them, and by name."""
    found: dict[tuple[str | None, str], list[Node]] = {}
    for node in nodes:
        found.setdefault((node.call.path, node.operator), []).append(node)
    return found


def needed_in_place(recording: Recording, modules: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The modules, if their callers count on their working in place; none otherwise.

    Both ways are recorded anew: the graph that there is says more, such as what was seen in calls that were dropped.
    """
    if not modules:
        return ()
    before = recording.again().graph
    try:
        for module in modules:
            setattr(module, "inplace", False)  # noqa: B010
        after = recording.again().graph
    finally:
        for module in modules:
            setattr(module, "inplace", True)  # noqa: B010
    return () if (before.exposed, _steps(before)) == (after.exposed, _steps(after)) else modules


def _steps(graph: Graph) -> list[tuple[str, list[int], list[bool]]]:
    """Every operator, the values that it reads, numbered in the order of their making, and what else sees its results.

    A value that is pinned is returned, stored, or seen by a hook.
    """
    return [
        (
            node.operator,
            [value.index for value in node.inputs],
            [value.pinned is None for value in node.outputs],
        )
        for node in graph.nodes
    ]


def _same_numbers(node: Node, other: Node) -> bool:
    if node.operator == "sum":
        ratio = (
            node.inputs[0].elements * other.outputs[0].elements == other.inputs[0].elements * node.outputs[0].elements
        )
        return ratio and _numbers(node.bound) == _numbers(other.bound)
    if _numbers(node.bound) != _numbers(other.bound) or len(node.inputs) != len(other.inputs):
        return False
    return all(_same_constant(a, b) for a, b in zip(node.inputs, other.inputs, strict=True))


def _numbers(argument: Any) -> Any:
    if isinstance(argument, dict):
        numbers = {name: _numbers(value) for name, value in argument.items()}
        return {name: number for name, number in numbers.items() if number is not None}  # a created bias is no number
    if isinstance(argument, (list, tuple)):
        return [_numbers(value) for value in argument]
    return argument if isinstance(argument, (int, float, complex)) else None


def _same_constant(a: Value, b: Value) -> bool:
    if a.kind is not Kind.CONSTANT or b.kind is not Kind.CONSTANT:
        return a.kind is b.kind
    assert a.tensor is not None
    assert b.tensor is not None
    if a.tensor is b.tensor:
        return True
    return (
        a.dtype == b.dtype and a.tensor.layout == b.tensor.layout == torch.strided and torch.equal(a.tensor, b.tensor)
    )
