"""Blocks that are a chain: children, activations and sums of branches, one after the other.

A block is replaced if at least one of the linear regions in the chain takes less as one layer: no more multiplications,
and less memory that is read and written. What stands in its place is a plain row of modules: the children that stay,
the activations, and the new layers. Nothing of the block's own code is left, so all that it did must be in the chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfuse.changes import NewLayer
from bnfuse.graph.graph import ModuleCall, Node, Value
from bnfuse.model import tree
from bnfuse.reasons import BLOCK_DOES_MORE, LAYER_DIFFERS
from bnfuse.restructuring.borders import Borders
from bnfuse.restructuring.linear_maps import NotOneLayerError
from bnfuse.restructuring.ownership import Owners, StaysError
from bnfuse.restructuring.recipes import Steps
from bnfuse.restructuring.regions import Region, region, roots

Part = str | NewLayer | Region
"""What stands in the place of a block, in turn: a child by its name, an activation, or what becomes a layer."""


@dataclass(frozen=True, eq=False)
class Block:
    """A module that can be replaced.

    Attributes:
        parts: what stands in its place.
        nodes: the operators that go, of all calls.
    """

    parts: tuple[Part, ...]
    nodes: set[Node]

    @property
    def regions(self) -> list[Region]:
        return [part for part in self.parts if isinstance(part, Region)]


def block(module: nn.Module, owners: Owners, steps: Steps) -> Block | None:
    """A module as a block, None if nothing would be gained.

    Raises:
        StaysError: something would be gained, but the module cannot be replaced.
    """
    calls = owners.calls.get(id(module), [])
    if not any(call.nodes for call in calls):
        return None
    first, *others = chains = [_Chain(call, steps, owners.borders) for call in calls]
    if not any(isinstance(link, Region) for link in first.links):
        return None
    names = {id(part): name for name, part in reversed(tree.named_modules(module))}
    parts = first.parts(names)
    if any(_key(other.parts(names)) != _key(parts) for other in others):
        raise StaysError(LAYER_DIFFERS.reason())
    for chain in chains:
        chain.check_whole()
    kept = [link.module for chain in chains for link in chain.links if isinstance(link, ModuleCall)]
    read = {node for chain in chains for link in chain.links if isinstance(link, Region) for node in link.nodes}
    owners.check([module], kept, read)
    return Block(parts, {node for chain in chains for node in chain.gone})


def _key(parts: Sequence[Part]) -> list[object]:
    """What is the same for blocks that do the same."""
    return [
        (part.recipe.step, part.recipe.axes, part.recipe.channels) if isinstance(part, Region)
        else (part.kind, dict(part.settings)) if isinstance(part, NewLayer)
        else part
        for part in parts
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Function:
    """An activation that is a function call."""

    node: Node
    layer: NewLayer


_Link = ModuleCall | Region | _Function


class _Chain:
    """A call as what is done to one tensor, one after the other.

    Attributes:
        links: from the input on, as far as it is a chain, seen from its end.
        whole: whether it is one.
    """

    def __init__(self, call: ModuleCall, steps: Steps, borders: Borders) -> None:
        self.call, self._steps, self._borders = call, steps, borders
        self.links: list[_Link] = []
        self.whole = False
        if call.plain and len(call.inputs) == len(call.outputs) == 1:
            self._nodes = call.all_nodes
            self._inside = set(self._nodes)
            self._children = {
                child.outputs[0]: child
                for child in call.children
                if child.plain and len(child.inputs) == len(child.outputs) == 1 and child.outputs != child.inputs
            }
            self.whole = self._follow()
            self.links.reverse()

    def _follow(self) -> bool:
        """Go from the end to the beginning; False if that does not lead there."""
        start, value = self.call.inputs[0], self.call.outputs[0]
        while value is not start:
            link = self._region(value) or self._children.get(value) or self._function(value)
            if link is None or (self.links and self._borders.is_seen(value)):
                return False
            self.links.append(link)
            value = _ends(link)[0]
            if value is not start and (value.producer is None or value.producer not in self._inside):
                return False  # of another input
        return True

    @property
    def gone(self) -> set[Node]:
        """The operators that are no longer run by what they were."""
        kept = {node for link in self.links if isinstance(link, ModuleCall) for node in link.all_nodes}
        return self._inside - kept

    def check_whole(self) -> None:
        """Raise StaysError if the call is no chain, or does anything else beside it."""
        if not self.whole:
            raise StaysError(BLOCK_DOES_MORE.reason())
        known: set[Node] = set()
        for link in self.links:
            known.update([link.node] if isinstance(link, _Function)
                         else link.nodes if isinstance(link, Region) else link.all_nodes)  # fmt: skip
        for node in self._nodes:
            if node not in known and (node.written or not all(value.independent for value in node.outputs)):
                raise StaysError(BLOCK_DOES_MORE.reason())
        for link in self.links[:-1]:
            if any(reader not in known for reader in _ends(link)[1].consumers):
                raise StaysError(BLOCK_DOES_MORE.reason())

    def parts(self, names: Mapping[int, str]) -> tuple[Part, ...]:
        """What stands in the place of the block.

        Args:
            names: of the modules in the block, by their ``id``.
        """
        made: list[Part] = []
        places: set[str] = set()
        for link in self.links:
            if isinstance(link, Region):
                made.append(link)
            elif isinstance(link, _Function):
                made.append(link.layer)
            else:
                place = names.get(id(link.module))
                if not place or (first := place.partition(".")[0]) in places:
                    raise StaysError(BLOCK_DOES_MORE.reason())  # it would stand at two places
                places.add(first)
                made.append(place)
        return tuple(made)

    def _region(self, value: Value) -> Region | None:
        """The region that ends at a value, has something of the call's own code in it, and gains most as a layer."""
        best: Region | None = None
        for root in roots(value, self._inside, self._borders):
            try:
                found = region(root, value, self._steps, self._borders)
            except NotOneLayerError:
                found = None
            if found is not None and any(node.call is self.call for node in found.nodes) and found.gains:
                best = found if best is None or found.gain > best.gain else best
            if root is self.call.inputs[0]:
                break
        return best

    def _function(self, value: Value) -> _Function | None:
        """An activation that the call's own code applies."""
        node = value.producer
        if node is None or node.call is not self.call or node.operator not in _ACTIVATIONS or len(node.outputs) != 1:
            return None
        kind, settings = _ACTIVATIONS[node.operator]
        if not set(node.bound) <= {"self", "input", *settings} or len(node.inputs) != 1:
            return None
        if any(written.storage is self.call.inputs[0].storage for written in node.written):
            return None
        return _Function(node, NewLayer(kind, {name: node.argument(name, usual) for name, usual in settings.items()}))


def _ends(link: _Link) -> tuple[Value, Value]:
    """What a part of a chain reads and what it makes."""
    if isinstance(link, Region):
        return link.root, link.result
    if isinstance(link, ModuleCall):
        return link.inputs[0], link.outputs[0]
    return link.node.inputs[0], link.node.outputs[0]


_ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "relu": ("ReLU", {}),
    "relu6": ("ReLU6", {}),
    "silu": ("SiLU", {}),
    "gelu": ("GELU", {"approximate": "none"}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "hardswish": ("Hardswish", {}),
    "hardsigmoid": ("Hardsigmoid", {}),
    "mish": ("Mish", {}),
    "leaky_relu": ("LeakyReLU", {"negative_slope": 0.01}),
    "elu": ("ELU", {"alpha": 1.0}),
}
"""Activations that are function calls: the module that does the same, and its settings with what they are if not given,
which the operator calls the same."""
