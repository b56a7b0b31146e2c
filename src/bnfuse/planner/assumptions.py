"""What a solution takes for granted, and further runs that show whether it holds. Most plans need none.

*Numbers.* ``x / 2`` passes a shift by halving it. Were the number ``x.shape[-1]``, the plan would hold at one size
only. So the operators whose numbers count are looked at again in runs with a larger batch and with every other axis
larger, as far as the model runs at such sizes.

*Work in place.* Without the norm before it, an activation that works in place may overwrite a tensor that is still
read, so it is to work out of place. That changes nothing where its caller uses what it returns, and everything where
the caller counts on the tensor being changed. The run with the setting switched off tells: it must read the same
values.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bnfuse.capture.run import capture, capture_shapes
from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.graph.graph import Graph, Kind, Node, Value
from bnfuse.planner.larger_inputs import OtherSizes
from bnfuse.rules import RULES

_RUNS = 3
"""Other sizes that are looked at, of those that the model takes."""


def varying(graph: Graph, nodes: Collection[Node], sizes: OtherSizes) -> set[Node]:
    """Those of the nodes whose numbers are others at another size; all of them if the runs cannot be compared."""
    different: set[Node] = set()
    for other in itertools.islice(sizes.graphs(), _RUNS):
        there = dict(zip(_places(other), other.nodes, strict=True))
        for place, node in zip(_places(graph), graph.nodes, strict=True):
            if node in nodes and (place not in there or not _same_numbers(node, there[place])):
                different.add(node)
    return different


def _places(graph: Graph) -> Iterator[tuple[str | None, str, int]]:
    """Where each operator stands: the module that ran it, its name, and how often this was so before."""
    counts: dict[tuple[str | None, str], int] = {}
    for node in graph.nodes:
        place = (node.call.path, node.operator)
        counts[place] = counts.get(place, -1) + 1
        yield (*place, counts[place])


def needed_in_place(
    model: nn.Module,
    graph: Graph,
    modules: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Sequence[nn.Module]:
    """The modules, if their callers count on their working in place; none otherwise."""
    if not modules:
        return ()
    try:
        for module in modules:
            setattr(module, "inplace", False)  # noqa: B010
        try:
            other = capture_shapes(model, args, kwargs, known=RULES).graph
        except (NeedsContentsError, Exception):  # noqa: BLE001 (whatever the unwritten numbers lead to)
            other = capture(model, args, kwargs, known=RULES).graph
    finally:
        for module in modules:
            setattr(module, "inplace", True)  # noqa: B010
    return () if (graph.exposed, _steps(graph)) == (other.exposed, _steps(other)) else modules


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
    if _numbers(node.bound) != _numbers(other.bound):
        return False
    return all(_same_constant(a, b) for a, b in zip(node.inputs, other.inputs, strict=True))


def _numbers(argument: Any) -> Any:
    if isinstance(argument, dict):
        return {name: _numbers(value) for name, value in argument.items()}
    if isinstance(argument, (list, tuple)):
        return [_numbers(value) for value in argument]
    return argument if isinstance(argument, (int, float, complex)) else None


def _same_constant(a: Value, b: Value) -> bool:
    if a.kind is not Kind.CONSTANT or b.kind is not Kind.CONSTANT:
        return a.kind is b.kind
    assert a.tensor is not None
    assert b.tensor is not None
    return a.tensor is b.tensor or torch.equal(a.tensor, b.tensor)
