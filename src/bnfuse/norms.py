"""Finding the batch norms of a model, and whether the code around them lets them be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfuse.capture import has_hooks
from bnfuse.graph import Graph, ModuleCall, Node, Value
from bnfuse.plan import Reason


@dataclass(frozen=True, eq=False)
class Norm:
    """One batch norm.

    Attributes:
        names: all names of the module, empty for a norm that is no module.
        label: what messages call it.
        nodes: the operators that it ran, one for each call.
        keep: names of its child modules that stay in its place (a built-in activation).
        obstacle: why it cannot be replaced whatever the algebra says, None if it can.
    """

    names: tuple[str, ...]
    label: str
    kind: str
    channels: int
    nodes: tuple[Node, ...]
    keep: tuple[str, ...] = ()
    obstacle: Reason | None = None

    @property
    def elements(self) -> int:
        """Size of the largest activation that it works on."""
        return max((node.outputs[0].elements for node in self.nodes), default=0)


def find_norms(model: nn.Module, graph: Graph) -> list[Norm]:
    """Every batch norm that the model holds or that ran, in the order of the model."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owned: dict[int, list[Node]] = {}
    functional: list[Node] = []
    for node in graph.nodes:
        if node.operator == "batch_norm":
            if _runs(node.call.module, node):
                owned.setdefault(id(node.call.module), []).append(node)
            else:
                functional.append(node)
    calls: dict[int, list[ModuleCall]] = {}
    for call in graph.calls:
        calls.setdefault(id(call.module), []).append(call)
    referenced = _referenced_elsewhere(model)
    norms = []
    for module in model.modules():
        if isinstance(module, _BatchNorm) or id(module) in owned:
            where = names[id(module)]
            nodes = owned.get(id(module), [])
            norms.append(_module_norm(module, where, nodes, calls.get(id(module), []), referenced))
    norms += [_functional_norm(node) for node in functional]
    return norms


def _runs(module: nn.Module, node: Node) -> bool:
    """True if the norm is run by the module that holds its statistics."""
    statistics = node.argument("running_mean")
    if isinstance(statistics, Value):
        return statistics.tensor is not None and statistics.tensor is module._buffers.get("running_mean")
    return isinstance(module, _BatchNorm)


def _module_norm(
    module: nn.Module, names: list[str], nodes: list[Node], calls: list[ModuleCall], referenced: dict[int, str]
) -> Norm:
    keep: tuple[str, ...] = ()
    obstacle = None
    if not calls:
        obstacle = Reason("it did not run, so nothing is known of where it belongs")
    elif any(node.argument("training") for node in nodes):
        obstacle = Reason("it uses the statistics of the batch, since it tracks none of its own")
    elif has_hooks(module):
        obstacle = Reason("it has a forward hook, which would be lost")
    elif id(module) in referenced:
        obstacle = Reason(f"the model also refers to it from {referenced[id(module)]}, where it cannot be replaced")
    elif "" in names:
        obstacle = Reason("it is the whole model")
    else:
        parts = [_rest(call) for call in calls]
        if any(part is None for part in parts) or len(set(parts)) != 1:
            obstacle = Reason(f"{type(module).__name__}.forward does more than normalise")
        else:
            keep = parts[0] or ()
    channels = getattr(module, "num_features", None) or (nodes[0].inputs[0].shape[1] if nodes else 0)
    return Norm(tuple(names), names[0] or type(module).__name__, type(module).__name__, channels, tuple(nodes), keep, obstacle)


def _functional_norm(node: Node) -> Norm:
    text = "the norm is a function call in the code, not a module that can be replaced"
    if node.argument("training"):
        text = "it uses the statistics of the batch"
    label = f"batch_norm in {node.call.label}"
    shape = node.inputs[0].shape
    return Norm((), label, "function", shape[1] if len(shape) > 1 else 0, (node,), obstacle=Reason(text))


def _rest(call: ModuleCall) -> tuple[str, ...] | None:
    """The children through which the output of the norm goes, in turn; None if the call does anything else."""
    if not call.plain or len(call.nodes) != 1 or call.nodes[0].operator != "batch_norm":
        return None
    norm = call.nodes[0]
    if call.inputs != [norm.bound["input"]]:
        return None
    value = norm.outputs[0]
    names = {id(module): name for name, module in call.module.named_children()}
    keep = []
    for child in call.children:
        if child.inputs != [value] or len(child.outputs) != 1 or id(child.module) not in names:
            return None
        value = child.outputs[0]
        if not isinstance(child.module, nn.Identity):
            keep.append(names[id(child.module)])
    return tuple(keep) if call.outputs == [value] else None


def _referenced_elsewhere(model: nn.Module) -> dict[int, str]:
    """Modules that are also held by plain attributes (a list, a bound method), by id, with the place."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            for other in _modules_in(value, 3):
                found[id(other)] = f"{name}.{attribute}" if name else attribute
    return found


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
        return
    if isinstance(getattr(value, "__self__", None), nn.Module):
        yield value.__self__
        return
    if depth == 0:
        return
    if isinstance(value, dict):
        for item in value.values():
            yield from _modules_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _modules_in(item, depth - 1)
