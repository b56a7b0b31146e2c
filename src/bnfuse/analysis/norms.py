"""Finding the batch norms of a model, and whether the code around them lets them be replaced."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfuse import reasons
from bnfuse.capture.module_calls import has_hooks
from bnfuse.graph.graph import Graph, ModuleCall, Node, is_as_in_its_class
from bnfuse.graph.norms import Norm, Site
from bnfuse.model import tree
from bnfuse.model.quantisation import is_watched, rounds_its_weight
from bnfuse.model.wrappers import HOOK_OF_ACCELERATE
from bnfuse.reasons import Reason
from bnfuse.rules.norm_statistics import is_step
from bnfuse.rules.shapes import is_rearrangement, rearranged

_DEPTH = 3
"""So many containers inside one another are searched for modules."""


def find_norms(model: nn.Module, graph: Graph, also: Sequence[str] = (), hooks_may_see: bool = False) -> list[Norm]:
    """Every batch norm that the model holds or that ran, in the order of the model.

    Args:
        also: patterns for the names of further classes that count as norms; upper and lower case are the same.
        hooks_may_see: whether a norm with a hook on its output may go.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    calls: dict[int, list[ModuleCall]] = {}
    for call in graph.calls:
        calls.setdefault(id(call.module), []).append(call)
    referenced = referenced_elsewhere(model)
    norms = [
        _module_norm(module, names[key], calls.get(key, []), referenced.get(key), hooks_may_see)
        for key, module in modules.items()
        if is_norm(module) or (also and _matches(module, also))
    ]
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
    """True for PyTorch's batch norms and for every class that keeps running statistics under the same names.

    So does an instance norm with ``track_running_stats``, which uses them in evaluation.
    """
    if isinstance(module, _BatchNorm):
        return True
    if tree.never_runs(module):
        return False
    buffers, parameters = module._buffers, module._parameters
    if isinstance(module, _InstanceNorm):
        return buffers.get("running_mean") is not None
    if not ("running_var" in buffers or "running_var" in parameters):
        return False
    return "running_mean" in buffers or "running_mean" in parameters


def _module_norm(
    module: nn.Module, names: list[str], calls: list[ModuleCall], referenced: str | None, hooks_may_see: bool
) -> Norm:
    kind = type(module).__name__
    own = [*module._parameters.values(), *module._buffers.values()]
    channels = getattr(module, "num_features", None) or max((t.numel() for t in own if t is not None), default=0)
    sites: tuple[Site, ...] = ()
    keep: tuple[str, ...] = ()
    obstacle = _obstacle(module, names, calls, referenced, hooks_may_see)
    if obstacle is None:
        found = _sites(calls)
        if found is None:
            work = "normalise" if is_norm(module) else "multiply and add per channel"
            obstacle = reasons.FORWARD_DOES_MORE.reason(kind=kind, work=work)
        else:
            sites, keep = found
    return Norm(tuple(names), names[0] or kind, kind, channels, sites, keep, obstacle)


def _obstacle(
    module: nn.Module, names: list[str], calls: list[ModuleCall], referenced: str | None, hooks_may_see: bool
) -> Reason | None:
    """Why the module cannot be replaced, whatever its forward computes; the first reason that applies.

    Args:
        referenced: an attribute of the model that also refers to the module, None if there is none.
        hooks_may_see: whether a hook on its output is no obstacle. One before it may change what it is given.
    """
    if not calls:
        return reasons.DID_NOT_RUN.reason()
    if any(_uses_batch_statistics(node) for call in calls for node in call.nodes):
        return reasons.TRACKS_NO_STATISTICS.reason()
    if isinstance(module, torch.jit.ScriptModule):
        return reasons.IS_SCRIPTED.reason()
    prepared = next((call.label for call in _around(calls) if rounds_its_weight(call.module)), None)
    if prepared is not None or is_watched(module):
        return reasons.IS_PREPARED.reason(place=prepared or calls[0].label)
    hooked = module._forward_pre_hooks if hooks_may_see else has_hooks(module)
    if hooked or HOOK_OF_ACCELERATE in module.__dict__:
        return reasons.HAS_HOOK.reason()
    if referenced is not None:
        return reasons.REFERENCED_ELSEWHERE.reason(place=referenced)
    reader = _other_reader(calls)
    if reader is not None:
        return reasons.PARAMETERS_READ_ELSEWHERE.reason(reader=reader)
    if "" in names:
        return reasons.IS_THE_MODEL.reason()
    return None


def _around(calls: list[ModuleCall]) -> list[ModuleCall]:
    return [call.parent for call in calls if call.parent is not None]


def _uses_batch_statistics(node: Node) -> bool:
    return node.operator == "batch_norm" and bool(node.argument("training"))


def _sites(calls: list[ModuleCall]) -> tuple[tuple[Site, ...], tuple[str, ...]] | None:
    """The place of each call, and the children that stay; None if a call does more, or not all keep the same ones."""
    parts = [_parts(call) for call in calls]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({children for _, children in found}) != 1:
        return None
    return tuple(site for site, _ in found), found[0][1]


def _other_reader(calls: list[ModuleCall]) -> Node | None:
    """An operator outside of the norm's own calls that reads its parameters or statistics, None if there is none."""
    own = [node for call in calls for node in call.all_nodes]
    inside = set(own)
    leaves = dict.fromkeys(value for node in own for value in node.inputs if value.names)
    return next((node for value in leaves for node in value.consumers if node not in inside), None)


def _functional_norm(node: Node) -> Norm:
    """A batch norm that is called as a function: it is listed, and always stays."""
    obstacle = reasons.IS_FUNCTION_CALL.reason()
    if _uses_batch_statistics(node):
        obstacle = reasons.USES_BATCH_STATISTICS.reason()
    label = f"batch_norm in {node.call.label}"
    shape = node.inputs[0].shape
    return Norm((), label, "function", shape[1] if len(shape) > 1 else 0, (), obstacle=obstacle)


def _parts(call: ModuleCall) -> tuple[Site, tuple[str, ...]] | None:
    """A call as a norm and the names of children that run after it (a built-in activation); None for anything else."""
    if not call.plain or len(call.inputs) != 1:
        return None
    value = call.inputs[0]
    steps: list[Node] = []
    for node in call.nodes:
        if all(output.independent for output in node.outputs) and node.outputs:
            continue  # prepares a scale or a shift from the module's own parameters
        if not (node.operator == "batch_norm" or is_step(node) or is_rearrangement(node)) or node.data is not value:
            return None
        if steps and (value.consumers != [node] or value.pinned is not None):
            return None
        value = node.outputs[0]
        steps.append(node)
    if all(map(is_rearrangement, steps)):
        return None
    site = Site(tuple(steps))
    if site.x.dtype != site.y.dtype or site.x.shape != site.y.shape or not _comes_back(site):
        return None
    names = {id(module): name for name, module in call.module.named_children()}
    keep = []
    for child in call.children:
        if child.outputs and all(output.independent for output in child.outputs):
            continue  # prepares a parameter
        if not child.plain or child.inputs != [value] or len(child.outputs) != 1 or id(child.module) not in names:
            return None
        value = child.outputs[0]
        if not isinstance(child.module, nn.Identity):
            keep.append(names[id(child.module)])
    return (site, tuple(keep)) if call.outputs == [value] else None


def _comes_back(site: Site) -> bool:
    """True if what the operators of a norm rearrange stands at its first place in the end."""
    moves = [node for node in site.nodes if is_rearrangement(node) and node.inputs[0].shape]
    if not moves:
        return True
    if site.x.elements == 0 or any(len(node.inputs) > 1 for node in moves):
        return False
    places = torch.arange(site.x.elements, device="cpu").reshape(site.x.shape)
    moved = places
    for node in moves:
        if moved.shape != node.inputs[0].shape:
            return False
        moved = rearranged(node, moved)
    return torch.equal(moved, places)


def referenced_elsewhere(model: nn.Module) -> dict[int, str]:
    """Plain attributes that also refer to a module (in a list, as a bound method, from a function's closure), by the
    ``id`` of the module."""
    modules = dict(tree.named_modules(model))

    def is_method(place: str) -> bool:
        holder, _, name = place.rpartition(".")
        return holder in modules and is_as_in_its_class(modules[holder], name)

    return {
        id(other): place
        for place, value in tree.plain_attributes(model)
        if not is_method(place)
        for other in tree.referred(value, _DEPTH)
        if isinstance(other, nn.Module)
    }
