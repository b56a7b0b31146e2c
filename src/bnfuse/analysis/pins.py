"""Values that must stay as they are, which the run alone does not tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx, nn

from bnfuse.graph.graph import Graph, ModuleCall, Value
from bnfuse.model import tree
from bnfuse.reasons import IDLE_NORM_MAY_READ, LAYER_NOT_NAMED, MODULE_DID_NOT_RUN


def pin_shared_with_idle(model: nn.Module, graph: Graph) -> None:
    """A parameter that also belongs to a module that did not run may be read there another time."""
    ran = _ran(graph)
    for value in dict.fromkeys(graph.leaves.values()):
        if len(value.names) == 1:
            continue
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in value.names}
        if len({id(owner) for owner in owners.values()}) > 1:
            idle = [name for name, owner in owners.items() if id(owner) not in ran]
            if idle:
                value.pin(MODULE_DID_NOT_RUN, name=idle[0])


def _ran(graph: Graph) -> set[int]:
    """The modules that ran, by their ``id``.

    The code of a graph module is a list of operators, which has run to its end. What it holds beside modules that it
    calls are parameters in modules without a forward, and nothing else reads them.
    """
    modules = tree.distinct(("", call.module) for call in graph.calls)
    holders = (part for module in modules if isinstance(module, fx.GraphModule) for part in tree.modules(module))
    return {*map(id, modules), *map(id, filter(tree.never_runs, holders))}


def pin_what_idle_norms_may_read(model: nn.Module, graph: Graph) -> list[str]:
    """Keep what a norm that did not run could have been given in place of one that did.

    A model may choose one of several norms (``self.norms[domain]``). So the module that would have called an idle one
    keeps every tensor that it handles itself and that has as many channels.

    Returns:
        The names of the outermost modules of which nothing took part.
    """
    ran = _ran(graph)
    read = {name for name, value in graph.leaves.items() if value.consumers}
    named = dict(tree.named_modules(model))
    idle = list(_idle(model, ran, read))
    calls: dict[int, list[ModuleCall]] = {}
    for call in graph.calls if idle else ():
        calls.setdefault(id(call.module), []).append(call)
    for name in idle:
        channels = _channels_of_norm(named[name])
        path = name
        while channels is not None and path:
            path = path.rpartition(".")[0]
            if id(named[path]) in ran:
                break
        for call in calls.get(id(named[path]), ()) if channels is not None else ():
            for value in _handled(call):
                if value.shape and not value.independent and channels in (value.shape[-1], *value.shape[1:2]):
                    value.pin(IDLE_NORM_MAY_READ, name=name)
    return idle


def _idle(model: nn.Module, ran: set[int], read: set[str]) -> Iterator[str]:
    """The outermost modules with parameters or buffers of which nothing took part."""
    stack = [(name, child) for name, child in model.named_children()]
    while stack:
        name, module = stack.pop()
        if id(module) not in ran and not any(id(part) in ran for part in tree.modules(module)):
            inside = [*module.named_parameters(name), *module.named_buffers(name)]
            if inside and not any(place in read for place, _ in inside):
                yield name
        else:
            stack += [(f"{name}.{place}", child) for place, child in module.named_children()]


def _channels_of_norm(module: nn.Module) -> int | None:
    """The number of channels that a norm takes, or a module that begins with one; None for any other module."""
    for part in tree.modules(module):
        if any(tensor is not None for tensor in (*part._parameters.values(), *part._buffers.values())):
            if "norm" not in type(part).__name__.lower() and "running_mean" not in part._buffers:
                return None
            held = [*part._buffers.values(), *part._parameters.values()]
            return max((tensor.numel() for tensor in held if tensor is not None), default=None)
    return None


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
