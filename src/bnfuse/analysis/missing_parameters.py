"""Biases and gains that layers were made without and that can be created: they enter the graph as values.

A layer that was made with ``bias=False`` can be given one, provided that its ``forward`` reads it. That is known of
PyTorch's own layers. Any other class is asked: its forward runs without a bias and with one of zeros, which must
arrive at its operators, whole or in parts, and change nothing. The operators that take it apart enter the graph beside
those that ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bnfuse.capture.escapes import READS_OF_SIZES_AND_ELEMENTS
from bnfuse.graph.graph import Graph, Kind, ModuleCall, Node, Storage, Value
from bnfuse.model import pytree, tree
from bnfuse.model.sandbox import Mode, forked_random_state, leave_no_trace
from bnfuse.operators import operator_of

_BIASED = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip

_PLACES = {**dict.fromkeys(_BIASED, ("bias",)), "batch_norm": ("weight", "bias")}

_KNOWN_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        _BatchNorm, nn.SyncBatchNorm,
    )
}  # fmt: skip


def add_absent(model: nn.Module, graph: Graph) -> tuple[list[Value], bool]:
    """Give every operator whose layer has an empty place for a bias (or gain) a value for it.

    Returns:
        The values; and whether code of the model goes by sizes or contents where such a place is not empty.
    """
    names: dict[int, list[str]] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module._parameters), []).append(name)
    created: list[Value] = []
    looks = False
    known: dict[tuple[Any, ...], bool] = {}
    for (key, place), calls in _empty_places(graph).items():
        if key not in names:
            continue
        routes = _routes(place, calls, known)
        if routes is None:
            continue
        dtype = _data_type(next(iter(calls.values()))[0], place)
        value = Value(-1 - len(created), Kind.ABSENT, (routes[0].size,), dtype, Storage(), independent=True)
        value.names = tuple(f"{name}.{place}" if name else place for name in names[key])
        looks |= any(route.looks for route in routes)
        for route in routes:
            graph.paths += route.lay(value, place)
        created.append(value)
    return created, looks


_Calls = dict[ModuleCall, list[Node]]


def _empty_places(graph: Graph) -> dict[tuple[int, str], _Calls]:
    """The operators that were given nothing where the module that ran them has an empty place.

    They are listed by place and by the registry that has it, which two modules may share.
    """
    found: dict[tuple[int, str], _Calls] = {}
    for node in graph.nodes:
        parameters = node.call.module._parameters
        for place in _PLACES.get(node.operator, ()):
            if node.argument(place) is None and place in parameters and parameters[place] is None:
                found.setdefault((id(parameters), place), {}).setdefault(node.call, []).append(node)
    return found


def _data_type(node: Node, place: str) -> torch.dtype:
    like = node.bound["weight"] if place == "bias" and node.argument("weight") else node.inputs[0]
    return like.dtype


def _channels(node: Node) -> int:
    if node.operator == "linear":
        return node.outputs[0].shape[-1]
    rank = len(node.outputs[0].shape)
    return node.outputs[0].shape[1 if node.operator == "batch_norm" else rank - int(node.operator[-2]) - 1]


@dataclass(frozen=True)
class _Route:
    """How what stands in the place would get to the operators of one call.

    Attributes:
        size: of what stands there.
        call: the call.
        steps: the operators that take it apart.
        uses: the operators of the call that are given it or a part of it, with the part.
        whole: what stands there, None if every use is given that.
        looks: whether the code goes by sizes or contents then.
    """

    size: int
    call: ModuleCall
    uses: list[tuple[Node, Tensor | None]]
    steps: list[_Step]
    whole: Tensor | None = None
    looks: bool = False

    def lay(self, value: Value, place: str) -> list[Node]:
        """Enter the steps and uses into the graph; returns the steps as operators."""
        values = {id(self.whole): value, id(None): value}
        nodes = []
        for step in self.steps:
            inputs: list[Value] = []

            def bind(argument: Any, inputs: list[Value] = inputs) -> Any:
                if isinstance(argument, Tensor):
                    inputs.append(values[id(argument)])
                    return inputs[-1]
                return tuple(map(bind, argument)) if isinstance(argument, (list, tuple)) else argument

            bound = {name: bind(argument) for name, argument in step.bound.items()}
            node = Node(-1, operator_of(step.overload).name, step.overload, bound, inputs, [], self.call)
            for tensor in step.results:
                made = Value(-1, Kind.COMPUTED, tuple(tensor.shape), value.dtype, value.storage, 0, node)
                made.independent, made.strides = True, tensor.stride()
                values[id(tensor)] = made
                node.outputs.append(made)
            for argument in inputs:
                argument.consumers.append(node)
            nodes.append(node)
        for node, part in self.uses:
            given = values[id(part)]
            node.bound[place] = given
            node.absent += (given,)
            given.consumers.append(node)
        return nodes


def _routes(place: str, calls: _Calls, known: dict[tuple[Any, ...], bool]) -> list[_Route] | None:
    """The routes of all calls of a module; None if one of them is not known, or does not lead to an operator."""
    routes = []
    for call, nodes in calls.items():
        module, kind = call.module, type(call.module)
        own = "forward" in module.__dict__
        size = _channels(nodes[0])
        whole = _Route(size, call, [(node, None) for node in nodes], [])
        if not own and kind.forward in _KNOWN_FORWARDS:
            routes.append(whole)
            continue
        key = (kind, place, *(node.operator for node in call.all_nodes))
        arrives = None if own or len(nodes) > 1 else known.get(key)
        if arrives is None:
            route = next((route for size in _sizes(module, nodes) if (route := _ask(call, nodes, place, size))), None)
            if route is None or not route.steps:
                known[key] = route is not None
        else:
            route = whole if arrives else None
        if route is None:
            return None
        routes.append(route)
    return routes if len({route.size for route in routes}) == 1 else None


def _sizes(module: nn.Module, nodes: list[Node]) -> list[int]:
    """What size the place may have: that of an operator's result, or what the module says of itself."""
    said = [getattr(module, name, None) for name in ("out_channels", "out_features")]
    sizes = [_channels(nodes[0]), *(size for size in said if isinstance(size, int))]
    return list(dict.fromkeys(sizes if len(nodes) == 1 else reversed(sizes)))


@dataclass(frozen=True)
class _Step:
    overload: Any
    bound: dict[str, Any]
    results: list[Tensor]


class _Trace(Mode):
    """Follows a tensor that is filled with one number to the operators of layers.

    Attributes:
        steps: what was done on the way.
        layers: the operators of all layers, by name, with what arrived in the place.
        lost: True if anything else was done with it.
    """

    def __init__(self, tensor: Tensor, place: str) -> None:
        super().__init__()
        self.tensor, self.place = tensor, place
        self.parts = {id(tensor): tensor}
        self.steps: list[_Step] = []
        self.layers: list[tuple[str, Tensor | None]] = []
        self.lost = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = operator_of(func)
        given = [tensor for _, tensor in pytree.tensors((args, kwargs))]
        ours = [tensor for tensor in given if id(tensor) in self.parts]
        if not ours and operator.name not in _PLACES:
            return result
        bound = dict(zip(operator.arguments, args, strict=False)) | kwargs
        if operator.name in _PLACES:
            arrived = bound.get(self.place)
            self.layers.append((operator.name, arrived if ours else None))
            self.lost |= bool(ours) and not (len(ours) == 1 and ours[0] is arrived)
            return result
        results = [tensor for _, tensor in pytree.tensors(result) if id(tensor) not in self.parts]
        filled = all(bool((tensor == self.tensor.flatten()[0]).all()) for tensor in results)
        self.lost |= len(ours) < len(given) or operator.written != () or not filled
        if results:
            self.steps.append(_Step(func, bound, results))
            self.parts.update((id(tensor), tensor) for tensor in results)
        return result


def _ask(call: ModuleCall, nodes: list[Node], place: str, size: int) -> _Route | None:
    """Run the module's forward with something in the place; None if that does not get to its operators alone."""
    module = call.module
    reference = next(module.parameters(recurse=False), None)
    device = reference.device if reference is not None else None
    if call.plain and len(call.inputs) == 1:
        value = call.inputs[0]
        args: tuple[Any, ...] = (torch.empty(value.shape, dtype=value.dtype, device="meta"),)
        kwargs: dict[str, Any] = {}
    elif call.arguments is not None:
        args, kwargs = call.arguments
    else:
        return None

    def run() -> object:
        with forked_random_state():
            given, named = pytree.map_tensors((args, kwargs), lambda tensor: _drawn(tensor, device))
            return module.forward(*given, **named)

    with leave_no_trace(tree.modules(module)):
        try:
            without = run()
            with _placed(module, place, size, device) as own, _Looks() as looks, _Trace(own, place) as trace:
                with_it = run()
        except Exception:  # noqa: BLE001 (whatever it raises, the answer is no)
            return None
        if not _alike(without, with_it):
            return None
    ran = [node for node in call.all_nodes if node.operator in _PLACES]
    if trace.lost or [name for name, _ in trace.layers] != [node.operator for node in ran]:
        return None
    uses = [(node, part) for node, (_, part) in zip(ran, trace.layers, strict=True) if part is not None]
    if not uses or any(node not in nodes for node, _ in uses):
        return None
    return _Route(size, call, uses, trace.steps, own, looks.seen)


def _drawn(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Random contents for a tensor that has none."""
    if not tensor.is_meta:
        return tensor.clone()
    make = torch.randn if tensor.is_floating_point() else torch.zeros
    return make(tensor.shape, dtype=tensor.dtype, device=device)  # like a tensor on meta would load PyTorch's compiler


def _alike(a: object, b: object) -> bool:
    """True if the results are equal up to rounding."""
    pairs = list(zip(pytree.tensors(a), pytree.tensors(b), strict=False))
    if len(pytree.tensors(a)) != len(pytree.tensors(b)) or not pairs:
        return False
    for (_, x), (_, y) in pairs:
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if x.is_floating_point():
            difference, size = (x - y).double().norm(), x.double().norm()
            if not bool(difference <= (1e-5 if x.dtype.itemsize > 2 else 1e-2) * size):
                return False
        elif not torch.equal(x, y):
            return False
    return True


class _Looks(TorchFunctionMode):
    """Notices code that goes by the size or the contents of a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen |= func in READS_OF_SIZES_AND_ELEMENTS and bool(args) and not isinstance(args[0], nn.Parameter)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _placed(module: nn.Module, place: str, size: int, device: torch.device | None) -> Iterator[Tensor]:
    weight = module._parameters.get("weight")
    dtype = None if weight is None else weight.dtype
    contents = torch.full((size,), 1.0 if place == "weight" else 0.0, device=device, dtype=dtype)
    parameter = nn.Parameter(contents)
    module._parameters[place] = parameter
    try:
        yield parameter
    finally:
        module._parameters[place] = None
