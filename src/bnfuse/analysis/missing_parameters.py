"""Biases and gains that layers were made without and that can be created: they enter the graph as values.

A layer that was made with ``bias=False`` can be given one, provided that its ``forward`` reads it. See
:mod:`bnfuse.analysis.parameter_routes` for how that is found out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.analysis.parameter_routes import PLACES, Calls, Route, Step, find_routes
from bnfuse.graph.graph import Graph, Kind, ModuleCall, Node, Storage, Value
from bnfuse.model import tree
from bnfuse.operators import operator_of
from bnfuse.rules.identity import ZEROS


def add_missing_parameters(model: nn.Module, graph: Graph) -> tuple[list[Value], bool]:
    """Give every operator whose layer has an empty place for a bias (or gain) a value for it.

    Returns:
        The values; and whether code of the model that does not know the place from PyTorch's own layers reads them,
        which may then go by sizes or contents.
    """
    names: dict[int, list[str]] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module._parameters), []).append(name)
    created: list[Value] = []
    read_by_other_code = False
    known: dict[tuple[Any, ...], bool] = {}
    for (key, place), calls in _empty_places(graph).items():
        routes = find_routes(place, calls, known) if key in names else None
        if routes is None:
            continue
        dtype = _dtype(*next(iter(calls.items())), place)
        value = Value(-1 - len(created), Kind.ABSENT, (routes[0].size,), dtype, Storage(), independent=True)
        value.names = tuple(f"{name}.{place}" if name else place for name in names[key])
        for route in routes:
            graph.paths += _add_route(route, value, place)
            read_by_other_code |= route.tried
        created.append(value)
    return created, read_by_other_code


def _empty_places(graph: Graph) -> dict[tuple[int, str], Calls]:
    """The operators that were given nothing, or zeros, where the module that ran them has an empty place.

    They are listed by the place and by the registry that has it, which two modules may share. A module of a class of
    the model's own that has no such operator may add a bias in the end.
    """
    found: dict[tuple[int, str], Calls] = {}
    for node in graph.nodes:
        parameters = node.call.module._parameters
        for place in PLACES.get(node.operator, ()):
            if _is_missing(node, place) and place in parameters and parameters[place] is None:
                found.setdefault((id(parameters), place), {}).setdefault(node.call, []).append(node)
    for call in graph.calls:
        parameters = call.module._parameters
        if "bias" in parameters and parameters["bias"] is None and len(call.outputs) == 1 and not call.is_standard:
            found.setdefault((id(parameters), "bias"), {}).setdefault(call, [])
    return found


def _is_missing(node: Node, place: str) -> bool:
    """True if nothing is given, or for a bias zeros that were made for this alone."""
    given = node.argument(place)
    if given is None or place != "bias":
        return given is None
    return given.producer is not None and given.producer.operator in ZEROS and given.consumers == [node]


def _dtype(call: ModuleCall, nodes: list[Node], place: str) -> torch.dtype:
    if not nodes:
        return call.outputs[0].dtype
    node = nodes[0]
    like = node.bound["weight"] if place == "bias" and node.argument("weight") else node.inputs[0]
    return like.dtype


def _add_route(route: Route, value: Value, place: str) -> list[Node]:
    """Enter the steps and the uses of a route into the graph; returns the steps as operators."""
    values = {id(route.parameter): value, id(None): value}
    nodes = [_add_step(step, values, value, route.call) for step in route.steps]
    for node, part in route.uses:
        given = values[id(part)]
        node.bound[place] = given
        node.absent += (given,)
        given.consumers.append(node)
    if route.added is not None:
        nodes.append(_add_sum(route.call, values[id(route.added)]))
    return nodes


def _add_sum(call: ModuleCall, part: Value) -> Node:
    """The sum of what a call gives and a bias, as an operator that makes the result of the call."""
    y = call.outputs[0]
    maker = y.producer
    assert maker is not None
    before = Value(-1, Kind.COMPUTED, y.shape, y.dtype, Storage(), 0, maker)
    before.independent, before.strides, before.pinned = y.independent, y.strides, y.pinned
    before.storage.values.append(before)
    bound = {"self": before, "other": part}
    node = Node(maker.index, "add", torch.ops.aten.add.Tensor, bound, [before, part], [y], call, absent=(part,))
    maker.outputs = [before if value is y else value for value in maker.outputs]
    y.producer = node
    for value in (before, part):
        value.consumers.append(node)
    return node


def _add_step(step: Step, values: dict[int, Value], parameter: Value, call: ModuleCall) -> Node:
    """A step as an operator, whose results are added to the values by the ``id`` of their tensor."""
    inputs: list[Value] = []

    def bind(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            inputs.append(values[id(argument)])
            return inputs[-1]
        return tuple(map(bind, argument)) if isinstance(argument, (list, tuple)) else argument

    bound = {name: bind(argument) for name, argument in step.bound.items()}
    node = Node(-1, operator_of(step.overload).name, step.overload, bound, inputs, [], call)
    for tensor in step.results:
        made = Value(-1, Kind.COMPUTED, tuple(tensor.shape), parameter.dtype, parameter.storage, 0, node)
        made.independent, made.strides = True, tensor.stride()
        values[id(tensor)] = made
        node.outputs.append(made)
    for value in inputs:
        value.consumers.append(node)
    return node
