"""Layer classes of the caller's own, each with a handler: a function that folds a scale and a shift into the layer.

A call of such a layer becomes one operator, whatever it runs inside. The layer itself takes the place of a parameter,
which absorbs the units of the output. Everything that the layer reads inside is pinned, so that nothing but the
handler changes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from bnfuse.changes import Handler
from bnfuse.graph.graph import Graph, Kind, ModuleCall, Node, Storage, Value
from bnfuse.model import tree
from bnfuse.reasons import HANDLER_MAKES, HANDLER_READS

_CHANNELS = 1


def add_custom_layers(model: nn.Module, graph: Graph, handlers: Mapping[type[nn.Module], Handler]) -> None:
    """Turn every call of a layer that has a handler into one operator.

    Args:
        handlers: by layer class; it also counts for subclasses.
    """
    if not handlers:
        return
    names: dict[int, list[str]] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module), []).append(name)
    layers: dict[int, Value] = {}
    for call in graph.calls:
        handler = _handler(call.module, handlers)
        inside = call.all_nodes
        if handler is None or not inside or id(call.module) not in names or len(call.outputs) != 1:
            continue
        y = call.outputs[0]
        channels = y.shape[_CHANNELS] if len(y.shape) > _CHANNELS else 1
        key = id(call.module)
        if key not in layers:
            value = Value(-1, Kind.LAYER, (channels,), y.dtype, Storage(), names=tuple(names[key]), independent=True)
            value.handler = handler
            layers[key] = value
        _collapse(call, inside, layers[key])


def _handler(module: nn.Module, handlers: Mapping[type[nn.Module], Handler]) -> Handler | None:
    return next((handler for kind, handler in handlers.items() if isinstance(module, kind)), None)


def _collapse(call: ModuleCall, inside: list[Node], layer: Value) -> None:
    """Make the last operator of the call stand for the whole call, and the others stand for nothing."""
    *rest, last = inside
    for node in inside:
        for value in node.inputs:
            if node in value.consumers:
                value.consumers.remove(node)
            if value.names:
                value.pin(HANDLER_READS)
        for value in node.outputs:
            if value not in call.outputs:
                value.pin(HANDLER_MAKES)
    for node in rest:
        node.operator, node.bound, node.inputs, node.outputs, node.written = "inside", {}, [], [], []
    last.operator, last.call = "handled", call
    last.inputs, last.outputs = [*call.inputs, layer], list(call.outputs)
    last.bound, last.written = {"layer": layer}, []
    for value in last.inputs:
        value.consumers.append(last)
    for value in last.outputs:
        value.producer = last
