"""Finding the batch norms of a model, and whether the code around them lets them be replaced."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfuse.capture.module_calls import has_hooks
from bnfuse.graph.graph import Graph, ModuleCall, Node
from bnfuse.graph.norms import Norm, Site
from bnfuse.model import tree
from bnfuse.reasons import Reason
from bnfuse.rules.norm_statistics import is_step


def find_norms(model: nn.Module, graph: Graph, also: Sequence[str] = ()) -> list[Norm]:
    """Every batch norm that the model holds or that ran, in the order of the model.

    Args:
        also: patterns for the names of further classes, whatever their case.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    calls: dict[int, list[ModuleCall]] = {}
    for call in graph.calls:
        calls.setdefault(id(call.module), []).append(call)
    referenced = _referenced_elsewhere(model)
    norms = []
    for key, module in modules.items():
        if is_norm(module) or (also and _matches(module, also)):
            norms.append(_module_norm(module, names[key], calls.get(key, []), referenced))
    norms += [
        _functional_norm(node)
        for node in graph.nodes
        if node.operator == "batch_norm" and not (is_norm(node.call.module) and id(node.call.module) in names)
    ]
    return norms


def _matches(module: nn.Module, patterns: Sequence[str]) -> bool:
    name = type(module).__name__.lower()
    return any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in patterns)


def is_norm(module: nn.Module) -> bool:
    """True for PyTorch's batch norms and for every class that keeps running statistics under the same names."""
    if isinstance(module, _BatchNorm):
        return True
    buffers, parameters = module._buffers, module._parameters
    if not ("running_var" in buffers or "running_var" in parameters):
        return False
    return ("running_mean" in buffers or "running_mean" in parameters) and not isinstance(module, _InstanceNorm)


def _module_norm(module: nn.Module, names: list[str], calls: list[ModuleCall], referenced: dict[int, str]) -> Norm:
    sites: list[Site] = []
    keep: tuple[str, ...] = ()
    obstacle = None
    if not calls:
        obstacle = "it did not run, so nothing is known of where it belongs"
    elif any(node.operator == "batch_norm" and node.argument("training") for call in calls for node in call.nodes):
        obstacle = "it uses the statistics of the batch, since it tracks none of its own"
    elif isinstance(module, torch.jit.ScriptModule):
        obstacle = "it is compiled by TorchScript, in which no module can be replaced"
    elif has_hooks(module):
        obstacle = "it has a forward hook, which would be lost"
    elif id(module) in referenced:
        obstacle = f"the model also refers to it from {referenced[id(module)]}, where it cannot be replaced"
    elif (reader := _reader(calls)) is not None:
        obstacle = f"its parameters are also read by {reader}"
    elif "" in names:
        obstacle = "it is the whole model"
    else:
        parts = [_parts(call) for call in calls]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or len({children for _, children in found}) != 1:
            what = "normalise" if is_norm(module) else "multiply and add per channel"
            obstacle = f"{type(module).__name__}.forward does more than {what}"
        else:
            sites, keep = [site for site, _ in found], found[0][1]
    own = [*module._parameters.values(), *module._buffers.values()]
    channels = getattr(module, "num_features", None) or max((t.numel() for t in own if t is not None), default=0)
    kind = type(module).__name__
    reason = None if obstacle is None else Reason(obstacle)
    return Norm(tuple(names), names[0] or kind, kind, channels, tuple(sites), keep, reason)


def _reader(calls: list[ModuleCall]) -> Node | None:
    """An operator outside of the norm's own calls that reads its parameters or statistics."""
    own = [node for call in calls for node in call.all_nodes]
    inside = set(own)
    leaves = {value for node in own for value in node.inputs if value.names}
    return next((node for value in leaves for node in value.consumers if node not in inside), None)


def _functional_norm(node: Node) -> Norm:
    text = "the norm is a function call in the code, not a module that can be replaced"
    if node.argument("training"):
        text = "it uses the statistics of the batch"
    label = f"batch_norm in {node.call.label}"
    shape = node.inputs[0].shape
    return Norm((), label, "function", shape[1] if len(shape) > 1 else 0, (), obstacle=Reason(text))


def _parts(call: ModuleCall) -> tuple[Site, tuple[str, ...]] | None:
    """A call as a norm followed by children (a built-in activation), by name; None if it does anything else."""
    if not call.plain or len(call.inputs) != 1:
        return None
    value = call.inputs[0]
    steps: list[Node] = []
    for node in call.nodes:
        if all(output.independent for output in node.outputs) and node.outputs:
            continue  # prepares a scale or a shift from the module's own parameters
        if not (node.operator == "batch_norm" or is_step(node)) or node.data is not value:
            return None
        if steps and value.consumers != [node]:
            return None
        value = node.outputs[0]
        steps.append(node)
    if not steps:
        return None
    site = Site(tuple(steps))
    if site.x.dtype != site.y.dtype or site.x.shape != site.y.shape:
        return None
    names = {id(module): name for name, module in call.module.named_children()}
    keep = []
    for child in call.children:
        if not child.plain or child.inputs != [value] or len(child.outputs) != 1 or id(child.module) not in names:
            return None
        value = child.outputs[0]
        if not isinstance(child.module, nn.Identity):
            keep.append(names[id(child.module)])
    return (site, tuple(keep)) if call.outputs == [value] else None


def _referenced_elsewhere(model: nn.Module) -> dict[int, str]:
    """Modules that are also held by plain attributes (a list, a bound method), by id, with the place."""
    found: dict[int, str] = {}
    for place, value in tree.plain_attributes(model):
        for other in _modules_in(value, 3):
            found[id(other)] = place
    return found


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
        return
    if isinstance(getattr(value, "__self__", None), nn.Module):
        yield value.__self__
        return
    if depth == 0 or tree.holds_no_object(value):
        return
    if isinstance(value, dict):
        for item in value.values():
            yield from _modules_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _modules_in(item, depth - 1)
