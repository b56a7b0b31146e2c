"""Linear layers one after the other: the first becomes one layer that does what both do, the other the identity.

``w2*(w1*x + b1) + b2`` is one layer, but mostly a dearer one. It is less where the tensor between them is large: where
many channels are made of few, and few of many.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from bnfuse.graph.graph import ModuleCall, Node, Value
from bnfuse.reasons import LAYER_DIFFERS
from bnfuse.restructuring.linear_maps import NotOneLayerError
from bnfuse.restructuring.ownership import Owners, StaysError
from bnfuse.restructuring.recipes import Steps
from bnfuse.restructuring.regions import Region, region

_LONGEST = 8
"""So many calls at most become one layer."""


@dataclass(frozen=True, eq=False)
class InTurn:
    """Calls of modules, one after the other, that are one layer.

    Attributes:
        calls: the layer stands in the place of the first.
        together: what they do.
    """

    calls: tuple[ModuleCall, ...]
    together: Region

    @property
    def key(self) -> tuple[object, ...]:
        """What is the same for another call of the same modules."""
        return (tuple(id(call.module) for call in self.calls), self.together.recipe.step)


class Search:
    """Finds sequences in a recorded model."""

    def __init__(self, owners: Owners, steps: Steps, gone: Container[Node]) -> None:
        """
        Args:
            gone: operators that become something else.
        """
        self.owners, self.steps = owners, steps
        self._maker: dict[Value, ModuleCall] = {}
        for call in owners.graph.calls:  # inner calls return first
            one_each = call.plain and len(call.inputs) == len(call.outputs) == 1
            if one_each and call.nodes and call.inputs[0] is not call.outputs[0] and call.nodes[0] not in gone:
                self._maker.setdefault(call.outputs[0], call)

    def find(self) -> Iterator[InTurn]:
        """Sequences that gain as one layer; none is part of another."""
        used: set[ModuleCall] = set()
        for value, last in reversed(self._maker.items()):
            if last in used:
                continue
            best = self._ending_at(value, used)
            if best is not None:
                used.update(best.calls)
                yield best

    def _ending_at(self, result: Value, used: set[ModuleCall]) -> InTurn | None:
        calls: list[ModuleCall] = []
        best: InTurn | None = None
        value = result
        while len(calls) < _LONGEST:
            call = self._maker.get(value)
            if call is None or call in used or not self._is_linear(call):
                break
            calls.insert(0, call)
            value = call.inputs[0]
            together = self._together(value, result, calls)
            if together is not None and (best is None or together.after.is_less_than(best.together.after)):
                best = InTurn(tuple(calls), together)
            if self.owners.borders.is_seen(value) or len(value.consumers) != 1:
                break
        return best

    def _together(self, value: Value, result: Value, calls: Sequence[ModuleCall]) -> Region | None:
        """The calls as one layer, None if that gains nothing."""
        try:
            together = region(value, result, self.steps, self.owners.borders)
        except NotOneLayerError:
            return None
        if len({id(call.module) for call in calls}) < len(calls):
            return None  # a module runs twice in it
        inside = together.nodes <= {node for call in calls for node in call.all_nodes}
        return together if inside and _gains(together, calls) else None

    def _is_linear(self, call: ModuleCall) -> bool:
        try:
            made = region(call.inputs[0], call.outputs[0], self.steps, self.owners.borders)
        except NotOneLayerError:
            return False
        return made.nodes >= set(_dependent(call))


def _dependent(call: ModuleCall) -> list[Node]:
    return [node for node in call.all_nodes if not all(value.independent for value in node.outputs)]


def _gains(together: Region, calls: Sequence[ModuleCall]) -> bool:
    """Whether one layer takes less, where norms would have gone anyway."""
    layers = sum(any(node.operator != "batch_norm" for node in call.all_nodes) for call in calls)
    return layers > 1 and together.gains


def check(found: InTurn, others: Sequence[InTurn], owners: Owners) -> set[Node]:
    """The operators that a sequence takes away, of all calls.

    Args:
        others: all sequences.

    Raises:
        StaysError: its modules do something else in another call, or serve something else.
    """
    same = [other for other in others if other.key == found.key]
    for place, call in enumerate(found.calls):
        if {id(each) for each in owners.calls[id(call.module)]} != {id(other.calls[place]) for other in same}:
            raise StaysError(LAYER_DIFFERS.reason())
    nodes = {node for other in same for node in other.together.nodes}
    owners.check([call.module for call in found.calls], (), nodes)
    return nodes
