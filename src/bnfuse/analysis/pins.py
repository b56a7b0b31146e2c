"""Values that must stay as they are, which the run alone does not tell."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bnfuse.graph.graph import Graph, Value
from bnfuse.reasons import LAYER_NOT_NAMED, MODULE_DID_NOT_RUN


def pin_shared_with_idle(model: nn.Module, graph: Graph) -> None:
    """A parameter that also belongs to a module that did not run may be read there another time."""
    ran = {id(call.module) for call in graph.calls}
    for value in dict.fromkeys(graph.leaves.values()):
        if len(value.names) == 1:
            continue
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in value.names}
        if len({id(owner) for owner in owners.values()}) > 1:
            idle = [name for name, owner in owners.items() if id(owner) not in ran]
            if idle:
                value.pin(MODULE_DID_NOT_RUN, name=idle[0])


def pin_others(model: nn.Module, values: Iterable[Value], layers: tuple[type[nn.Module], ...]) -> None:
    """Keep the parameters of all classes of layers but the named ones as they are."""
    for value in values:
        for name in value.names:
            owner = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, layers):
                value.pin(LAYER_NOT_NAMED, kind=type(owner).__name__)
