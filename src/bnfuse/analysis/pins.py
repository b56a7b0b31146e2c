"""Values that must stay as they are, which the run alone does not tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from bnfuse.graph.graph import Graph, ModuleCall, Value
from bnfuse.model import tree
from bnfuse.reasons import IDLE_MODULE_MAY_READ, LAYER_NOT_NAMED, MODULE_DID_NOT_RUN


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


def pin_what_idle_modules_may_read(model: nn.Module, graph: Graph) -> None:
    """Keep what a module that did not run could have been given in place of one that did.

    A model may choose one of several norms, heads or branches (``self.norms[domain]``). So the module that would have
    called it keeps every tensor that it handles itself and that has as many channels as the idle one takes.
    """
    ran = {id(call.module) for call in graph.calls}
    read = {name for name, value in graph.leaves.items() if value.consumers}
    calls: dict[int, list[ModuleCall]] | None = None
    named = dict(tree.named_modules(model))
    for name, sizes in _idle(model, ran, read):
        path = name
        while path:
            path = path.rpartition(".")[0]
            if id(named[path]) in ran:
                break
        if calls is None:
            calls = {}
            for call in graph.calls:
                calls.setdefault(id(call.module), []).append(call)
        for call in calls.get(id(named[path]), ()):
            for value in _handled(call):
                if value.shape and not value.independent and sizes & {value.shape[-1], *value.shape[1:2]}:
                    value.pin(IDLE_MODULE_MAY_READ, name=name)


def _idle(model: nn.Module, ran: set[int], read: set[str]) -> Iterator[tuple[str, set[int]]]:
    """The outermost modules of which nothing took part, with the numbers of channels that they may take."""
    stack = [(name, child) for name, child in model.named_children()]
    while stack:
        name, module = stack.pop()
        modules = tree.modules(module)
        inside = [*module.named_parameters(name), *module.named_buffers(name)]
        if id(module) not in ran and not any(id(part) in ran for part in modules):
            if inside and not any(place in read for place, _ in inside):
                yield name, {size for part in modules for size in _channels(part)}
        else:
            stack += [(f"{name}.{place}", child) for place, child in module.named_children()]


def _channels(module: nn.Module) -> Iterator[int]:
    """The number of channels that a layer or norm takes."""
    for attribute in ("in_channels", "in_features", "num_features", "input_size", "num_channels"):
        size = getattr(module, attribute, None)
        if isinstance(size, int):
            yield size
            return
    statistics = module._buffers.get("running_mean")
    if statistics is not None:
        yield statistics.numel()
        return
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dim() == 2:
            yield parameter.shape[1]
        elif parameter is not None and parameter.dim():
            yield max(parameter.shape)


def _handled(call: ModuleCall) -> Iterator[Value]:
    """The tensors that the code of a module has in its hands."""
    yield from call.inputs
    yield from call.outputs
    for node in call.nodes:
        yield from node.inputs
        yield from node.outputs
    for child in call.children:
        yield from child.inputs
        yield from child.outputs


def pin_others(model: nn.Module, values: Iterable[Value], layers: tuple[type[nn.Module], ...]) -> None:
    """Keep the parameters of all classes of layers but the named ones as they are."""
    for value in values:
        for name in value.names:
            owner = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, layers):
                value.pin(LAYER_NOT_NAMED, kind=type(owner).__name__)
