"""Whether a module can be taken away: what it consists of must serve nothing else."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch
from torch import nn

from bnfuse.capture.module_calls import has_own_hooks
from bnfuse.graph.graph import Graph, ModuleCall, Node, Value
from bnfuse.model import tree
from bnfuse.reasons import (
    BLOCK_DOES_MORE,
    BLOCK_IS_SHARED,
    IS_SCRIPTED,
    IS_THE_MODEL,
    LAYER_HAS_HOOK,
    PARAMETERS_READ_ELSEWHERE,
    REFERENCED_ELSEWHERE,
    Reason,
)
from bnfuse.restructuring.borders import Borders


class StaysError(Exception):
    """Something stays as it is, for a reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Owners:
    """What the modules of a model hold, and who else refers to it.

    Attributes:
        names: all names of a module, by its ``id``.
        calls: all calls of a module, by its ``id``.
        borders: the written borders of the graph.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model, self.graph, self.borders = model, graph, Borders(graph)
        self.names: dict[int, list[str]] = {}
        self._modules = dict(tree.named_modules(model))
        for name, module in self._modules.items():
            self.names.setdefault(id(module), []).append(name)
        self.calls: dict[int, list[ModuleCall]] = {}
        for call in graph.calls:
            self.calls.setdefault(id(call.module), []).append(call)
        self._referenced: dict[int, list[str]] = {}
        for place, value in tree.plain_attributes(model):
            for other in tree.referred(value):
                if isinstance(other, nn.Module):
                    self._referenced.setdefault(id(other), []).append(place)

    def name(self, module: nn.Module) -> str:
        return self.names[id(module)][0]

    def check(self, modules: Sequence[nn.Module], kept: Iterable[nn.Module], read: Container[Node]) -> None:
        """Raise StaysError if anything else has to do with what goes.

        Args:
            modules: that are replaced.
            kept: modules in them that stay.
            read: the operators that are replaced.
        """
        if any(module is self.model for module in modules):
            raise StaysError(IS_THE_MODEL.reason())
        staying = {id(part) for module in kept for part in tree.modules(module)}
        lost = [part for module in modules for part in tree.modules(module) if id(part) not in staying]
        places = tuple(f"{name}." for module in modules for name in self.names[id(module)])
        outer = {id(module) for module in modules}
        for module in modules:
            for name in self.names[id(module)]:
                parent = self._modules[name.rpartition(".")[0]]
                if isinstance(parent, torch.jit.ScriptModule):
                    raise StaysError(IS_SCRIPTED.reason())
        for part in lost:
            if id(part) not in outer and not all(name.startswith(places) for name in self.names[id(part)]):
                raise StaysError(BLOCK_IS_SHARED.reason(place=self.name(part)))
            if has_own_hooks(part) or part._backward_hooks or part._backward_pre_hooks:
                raise StaysError(LAYER_HAS_HOOK.reason())
            for place in self._referenced.get(id(part), ()):
                owner = self._modules.get(place.rpartition(".")[0])
                if owner is None or not any(owner is other for other in lost):
                    raise StaysError(REFERENCED_ELSEWHERE.reason(place=place))
            if any(not _runs_in(call, outer) for call in self.calls.get(id(part), ())):
                raise StaysError(BLOCK_IS_SHARED.reason(place=self.name(part)))
            for call in self.calls.get(id(part), ()):
                if any(value.tensor is not None for node in call.nodes for value in node.written):
                    raise StaysError(BLOCK_DOES_MORE.reason())  # it remembers something
            self._check_parameters(part, places, read)

    def _check_parameters(self, part: nn.Module, places: tuple[str, ...], read: Container[Node]) -> None:
        for place, parameter in part._parameters.items():
            if parameter is None:
                continue
            name = ".".join(filter(None, [self.name(part), place]))
            value = self.graph.leaves.get(name)
            if value is None or not value.consumers:
                raise StaysError(BLOCK_IS_SHARED.reason(place=name))
            if value.pinned is not None:
                raise StaysError(value.pinned)
            if not all(each.startswith(places) for each in value.names):
                raise StaysError(BLOCK_IS_SHARED.reason(place=name))
            _check_readers(value, read)
        for place in part._buffers:
            value = self.graph.leaves.get(".".join(filter(None, [self.name(part), place])))
            if value is not None:
                _check_readers(value, read)


def _check_readers(value: Value, read: Container[Node]) -> None:
    """Raise StaysError if other operators than these read a parameter or buffer."""
    reader = next((node for node in value.consumers if not _ends_in(node, read)), None)
    if reader is not None:
        raise StaysError(PARAMETERS_READ_ELSEWHERE.reason(reader=reader))


def _runs_in(call: ModuleCall | None, modules: Container[int]) -> bool:
    """Whether a call is one of some modules, or is made by one of theirs."""
    while call is not None and id(call.module) not in modules:
        call = call.parent
    return call is not None


def _ends_in(node: Node, read: Container[Node]) -> bool:
    """Whether an operator is one of these, or prepares what only these read."""
    if node in read:
        return True
    return all(value.independent and value.pinned is None for value in node.outputs) and all(
        _ends_in(reader, read) for value in node.outputs for reader in value.consumers
    )
