"""How a parameter that a layer was made without would reach the operators that run inside its ``forward``.

For PyTorch's own layers that is known: the parameter is the operator's argument. The forward of any other class is
tried: it runs without the parameter and with one that changes nothing (a bias of zeros, a gain of ones). The results
must be equal, and the parameter must arrive at the layer's own operators, whole or in parts, and nowhere else. Or all
that the forward does with a bias is to add it to its result in the end (``y + self.bias`` of a graph convolution).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfuse.graph.graph import ModuleCall, Node, is_as_in_its_class
from bnfuse.model import pytree, tree
from bnfuse.model.other_state import OF_MODULES
from bnfuse.model.sandbox import Mode, forked_random_state, leave_no_trace
from bnfuse.operators import operator_of

_BIASED = {
    "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "torchvision::deform_conv2d",
}  # fmt: skip

PLACES = {**dict.fromkeys(_BIASED, ("bias",)), "batch_norm": ("weight", "bias")}
"""The parameters that an operator does without."""

_KNOWN_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
        nn.ConvTranspose3d, _BatchNorm, nn.SyncBatchNorm, _InstanceNorm,
    )
}  # fmt: skip

Calls = dict[ModuleCall, list[Node]]
"""The calls of a module, each with the operators in it that lack the parameter."""


@dataclass(frozen=True)
class Step:
    """An operator that takes the parameter apart: what it is given, tensors included, and what it makes."""

    overload: Any
    bound: dict[str, Any]
    results: list[Tensor]


@dataclass(frozen=True)
class Route:
    """How the parameter reaches the operators of one call.

    Attributes:
        size: the number of elements of the parameter.
        uses: the operators that are given the parameter or a part of it, with the part; None is the whole.
        steps: the operators that take it apart.
        parameter: the tensor that was tried, None if every use is given the whole.
        tried: whether this was found by running the forward.
        added: the part that is added to the result of the call, None if it goes to operators.
    """

    size: int
    call: ModuleCall
    uses: list[tuple[Node, Tensor | None]]
    steps: list[Step]
    parameter: Tensor | None = None
    tried: bool = False
    added: Tensor | None = None


def find_routes(place: str, calls: Calls, known: dict[tuple[Any, ...], bool]) -> list[Route] | None:
    """The routes of all calls of a module; None if one of them is not known, or does not lead to an operator.

    Args:
        place: the name of the parameter, "weight" or "bias".
        known: whether classes hand the parameter on whole, as found so far. It is added to.
    """
    routes = []
    for call, nodes in calls.items():
        route = _route(place, call, nodes, known)
        if route is None:
            return None
        routes.append(route)
    same = len({(route.size, route.added is None) for route in routes}) == 1
    return routes if same else None


def _route(place: str, call: ModuleCall, nodes: list[Node], known: dict[tuple[Any, ...], bool]) -> Route | None:
    module = call.module
    own_forward = _has_methods_of_its_own(module)
    kind: Any = type(module)
    if not own_forward and nodes and _is_known(kind):
        return _to_all(nodes, call)
    key = (type(module), place, *(node.operator for node in call.all_nodes))
    if key in known and not own_forward and len(nodes) < 2:
        return _to_all(nodes, call) if known[key] and nodes else None
    tried = (_try(call, nodes, place, size) for size in _sizes(call, nodes))
    route = next((route for route in tried if route is not None), None)
    if route is None or not (route.steps or route.added is not None):
        known[key] = route is not None
    return route


def _to_all(nodes: list[Node], call: ModuleCall) -> Route:
    return Route(_channels(nodes[0]), call, [(node, None) for node in nodes], [])


def _has_methods_of_its_own(module: nn.Module) -> bool:
    """True if methods of the object stand before those of its class."""
    names = (name for name in module.__dict__.keys() - OF_MODULES if callable(getattr(type(module), name, None)))
    return any(not is_as_in_its_class(module, name) for name in names)


@functools.cache
def _is_known(kind: type[nn.Module]) -> bool:
    """True for a class of PyTorch's, and for one that adds to it without a change to what its forward calls."""
    if kind.forward not in _KNOWN_FORWARDS:
        return False
    added = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    known = [base for base in kind.__mro__ if base.__module__.startswith("torch.")]
    return not any(_is_method(name, base) for own in added for name in vars(own) for base in known)


def _is_method(name: str, kind: type[nn.Module]) -> bool:
    looks_up = name in ("__getattr__", "__getattribute__")
    return looks_up or (not name.startswith("__") and callable(vars(kind).get(name)))


def _channels(node: Node) -> int:
    """The number of channels of what an operator makes."""
    shape = node.outputs[0].shape
    if node.operator in ("linear", "bilinear"):
        return shape[-1]
    if node.operator == "batch_norm":
        return shape[1]
    spatial = int(node.operator[-2])  # conv2d has 2 axes behind the channels
    return shape[len(shape) - spatial - 1]


def _sizes(call: ModuleCall, nodes: list[Node]) -> list[int]:
    """The sizes to try: that of an operator's result, and what the module says of itself, the likelier one first."""
    said = [getattr(call.module, name, None) for name in ("out_channels", "out_features")]
    sizes = [_channels(nodes[0])] if nodes else [call.outputs[0].shape[-1]]
    sizes += [size for size in said if isinstance(size, int)]
    return list(dict.fromkeys(sizes if len(nodes) == 1 else reversed(sizes)))


def _try(call: ModuleCall, nodes: list[Node], place: str, size: int) -> Route | None:
    """Run the module's forward with a parameter of this size; None if that does not reach its operators alone."""
    module = call.module
    arguments = _arguments(call)
    if arguments is None:
        return None
    reference = next(module.parameters(recurse=False), None)
    device = reference.device if reference is not None else torch.device("cpu")
    found = _traced(module, place, size, device, arguments)
    if found is None:
        return None
    trace, parameter = found
    uses: list[tuple[Node, Tensor | None]] = []
    if trace.added is not None:
        reshaped = all(operator_of(step.overload).name in _RESHAPING for step in trace.steps)
        if trace.lost or not trace.ends or not reshaped or not _can_be_added_to(call):
            return None
    else:
        ran = [node for node in call.all_nodes if node.operator in PLACES]
        if trace.lost or [name for name, _ in trace.layers] != [node.operator for node in ran]:
            return None
        uses += [(node, part) for node, (_, part) in zip(ran, trace.layers, strict=True) if part is not None]
        if not uses or any(node not in nodes for node, _ in uses):
            return None
    for other in _other_sizes(arguments):
        there = _traced(module, place, size, device, other)
        if there is None and _runs(module, device, other):
            return None  # it reads the parameter at some sizes
        if there is not None and (there[0].lost or there[0].arrivals != trace.arrivals):
            return None
        if there is not None and there[0].ends != trace.ends:
            return None
    return Route(size, call, uses, trace.steps, parameter, tried=True, added=trace.added)


_RESHAPING = {
    "view", "reshape", "unsqueeze", "squeeze", "unflatten", "expand", "expand_as", "broadcast_to", "to", "_to_copy",
    "type_as", "alias", "detach", "slice",
}  # fmt: skip
"""Operators of which a bias may come that is added in the end."""


def _can_be_added_to(call: ModuleCall) -> bool:
    """True if the call made its result itself, in memory of its own, and read it no more."""
    if len(call.outputs) != 1 or not call.outputs[0].dtype.is_floating_point:
        return False
    y, inside = call.outputs[0], call.all_nodes
    made = y.producer is not None and y.producer in inside and y.producer.operator != "handled"
    first, *views = y.storage.values
    alone = first is y and not any(view.producer in inside for view in views)
    return made and alone and not any(y in node.inputs for node in inside)


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _traced(
    module: nn.Module, place: str, size: int, device: torch.device, arguments: _Arguments
) -> tuple[_Trace, Tensor] | None:
    """Run the forward without and with the parameter; None if it does not run, or gives something else with it."""
    with leave_no_trace(tree.modules(module)):
        try:
            with _Trace(torch.empty(0, device="cpu"), place) as before:
                without = _forward(module, device, arguments)
            with _created(module, place, size, device) as parameter, _Trace(parameter, place) as trace:
                with_parameter = _forward(module, device, arguments)
        except Exception:  # noqa: BLE001 (whatever it raises, the answer is no)
            return None
    nowhere_else = not any(arrived is not None for _, arrived in trace.layers) and trace.others == before.others
    trace.ends = place == "bias" and trace.added is not None and with_parameter is trace.sum and nowhere_else
    return (trace, parameter) if _equal(without, with_parameter) else None


def _runs(module: nn.Module, device: torch.device, arguments: _Arguments) -> bool:
    with leave_no_trace(tree.modules(module)):
        try:
            _forward(module, device, arguments)
        except Exception:  # noqa: BLE001 (a size that the module does not take)
            return False
    return True


def _forward(module: nn.Module, device: torch.device, arguments: _Arguments) -> object:
    with forked_random_state():  # the same numbers each time
        args, kwargs = pytree.map_tensors(arguments, lambda tensor: _with_contents(tensor, device))
        return module.forward(*args, **kwargs)


def _other_sizes(arguments: _Arguments) -> Iterator[_Arguments]:
    """The arguments with a larger batch, and with larger and smaller other axes."""
    for axes, step in (((0,), 1), ((2, 3, 4), 1), ((2, 3, 4), -1), ((1, 2, 3), 1)):

        def resized(tensor: Tensor, axes: tuple[int, ...] = axes, step: int = step) -> Tensor:
            shape = [max(1, size + step) if axis in axes else size for axis, size in enumerate(tensor.shape)]
            return tensor.new_empty(shape) if tensor.is_meta else tensor

        yield pytree.map_tensors(arguments, resized)


def _arguments(call: ModuleCall) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the call was given, large tensors without contents; None if that is not known."""
    if call.plain and len(call.inputs) == 1:
        value = call.inputs[0]
        return (torch.empty(value.shape, dtype=value.dtype, device="meta"),), {}
    return call.arguments


def _with_contents(tensor: Tensor, device: torch.device) -> Tensor:
    """Random contents for a tensor that has none."""
    if not tensor.is_meta:
        return tensor.clone()
    make = torch.randn if tensor.is_floating_point() else torch.zeros
    return make(tensor.shape, dtype=tensor.dtype, device=device)  # randn_like would load PyTorch's compiler here


@contextlib.contextmanager
def _created(module: nn.Module, place: str, size: int, device: torch.device) -> Iterator[Tensor]:
    """The module has a parameter that changes nothing."""
    weight = module._parameters.get("weight")
    dtype = None if weight is None else weight.dtype
    parameter = nn.Parameter(torch.full((size,), 1.0 if place == "weight" else 0.0, device=device, dtype=dtype))
    module._parameters[place] = parameter
    try:
        yield parameter
    finally:
        module._parameters[place] = None


def _equal(a: object, b: object) -> bool:
    """True if the results are equal up to rounding."""
    left, right = pytree.tensors(a), pytree.tensors(b)
    if len(left) != len(right) or not left:
        return False
    return all(_equal_tensors(x, y) for (_, x), (_, y) in zip(left, right, strict=True))


def _equal_tensors(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    tolerance = 1e-5 if x.dtype.itemsize > 2 else 1e-2
    return bool((x - y).double().norm() <= tolerance * x.double().norm())


class _Trace(Mode):
    """Follows a tensor that is filled with one number to the operators of layers.

    Attributes:
        steps: what was done on the way.
        layers: the operators of all layers, by name, with what arrived in the place.
        added: what of it was added to something else, None if nothing was.
        sum: the result of that.
        lost: True if anything else was done with it.
        others: the operators that had nothing to do with it.
        ends: True if the forward gives the sum, and does nothing else that it does not do without.
    """

    @property
    def arrivals(self) -> list[tuple[str, bool]]:
        """The operators of all layers, and whether something arrived there."""
        return [(name, arrived is not None) for name, arrived in self.layers]

    def __init__(self, tensor: Tensor, place: str) -> None:
        super().__init__()
        self.tensor, self.place = tensor, place
        self.parts = {id(tensor): tensor}
        self.steps: list[Step] = []
        self.layers: list[tuple[str, Tensor | None]] = []
        self.added: Tensor | None = None
        self.sum: Tensor | None = None
        self.lost = False
        self.others: list[Any] = []
        self.ends = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.unrolled(func, args, kwargs)
        result = func(*args, **kwargs)
        operator = operator_of(func)
        given = [tensor for _, tensor in pytree.tensors((args, kwargs))]
        ours = [tensor for tensor in given if id(tensor) in self.parts]
        if not ours:
            self.others.append(func)
        if not ours and operator.name not in PLACES:
            return result
        bound = dict(zip(operator.arguments, args, strict=False)) | kwargs
        if operator.name in PLACES:
            arrived = bound.get(self.place)
            self.layers.append((operator.name, arrived if ours else None))
            self.lost |= bool(ours) and not (len(ours) == 1 and ours[0] is arrived)
            return result
        if operator.name == "add" and len(given) == 2 and len(ours) == 1 and self.added is None:
            [other] = [tensor for tensor in given if tensor is not ours[0]]
            self.added, self.sum = ours[0], result
            self.lost |= (
                result.shape != other.shape or bound.get("alpha", 1) != 1 or operator.written not in ((), ("self",))
            )
            self.lost |= operator.written != () and bound["self"] is not other
            return result
        results = [tensor for _, tensor in pytree.tensors(result) if id(tensor) not in self.parts]
        filled = all(bool((tensor == self.tensor.flatten()[0]).all()) for tensor in results)
        self.lost |= len(ours) < len(given) or operator.written != () or not filled
        if results:
            self.steps.append(Step(func, bound, results))
            self.parts.update((id(tensor), tensor) for tensor in results)
        return result
