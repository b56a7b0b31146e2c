"""Further runs, where a plan takes something for granted that one run cannot show. Most plans need none.

*Numbers.* ``x / 2`` passes a shift by halving it. Were the number ``x.shape[-1]``, the plan would hold at one size
only. So the operators whose numbers count are looked at again in runs with a larger batch and with every other axis
larger, as far as the model runs at such sizes.

*Work in place.* Without the norm before it, an activation that works in place may overwrite a tensor that is still
read, so it is to work out of place. That changes nothing where its caller uses what it returns, and everything where
the caller counts on the tensor being changed. The run with the setting switched off tells: it must read the same
values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse import tree
from bnfuse.capture import capture
from bnfuse.errors import InputError
from bnfuse.graph import Graph, Kind, Node, Value

_ALIGNMENT = 32
"""Networks halve images up to five times, so a size that divides by 32 is enlarged by 32."""


def varying(
    model: nn.Module, graph: Graph, nodes: Collection[Node], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[Node]:
    """Those of the nodes whose numbers are others at another size; all of them if the runs cannot be compared."""
    different: set[Node] = set()
    for larger_args, larger_kwargs in _larger(args, kwargs):
        try:
            other = capture(model, larger_args, larger_kwargs).graph
        except InputError:
            continue
        if [node.operator for node in other.nodes] != [node.operator for node in graph.nodes]:
            return set(nodes)
        different |= {node for node in nodes if not _same_numbers(node, other.nodes[node.index])}
    return different


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
        other = capture(model, args, kwargs).graph
    finally:
        for module in modules:
            setattr(module, "inplace", True)  # noqa: B010
    return () if _steps(graph) == _steps(other) else modules


def _steps(graph: Graph) -> list[tuple[str, list[int], list[bool]]]:
    """Every operator, the values that it reads, numbered in the order of their making, and what else sees its results.

    A value that is pinned is returned, stored, or seen by a hook.
    """
    return [
        (
            node.operator,
            [value.index for value in node.inputs if value.kind is not Kind.ABSENT],
            [value.pinned is None for value in node.outputs],
        )
        for node in graph.nodes
    ]


def _larger(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs, larger along one axis at a time, by one and by a round number: all tensors that have the axis."""
    rank = max((tensor.dim() for _, tensor in tree.tensors((args, kwargs))), default=0)
    for axis in range(rank):
        for aligned in (False,) if axis == 0 else (False, True):

            def grow(tensor: Tensor, axis: int = axis, aligned: bool = aligned) -> Tensor:
                if tensor.dim() <= axis:
                    return tensor
                size = tensor.shape[axis]
                more = 1 if not aligned else _ALIGNMENT if size % _ALIGNMENT == 0 else size
                return torch.cat([tensor, tensor.narrow(axis, 0, min(more, size))], axis)

            yield tree.map_tensors((args, kwargs), grow)


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
