"""Laying a graph out as modules: norms and empty places for biases, of which a graph has neither.

A norm is put where its tensors are, under the name that it had before the model was exported, if nothing else is there
and nothing else reads them (``layer1.0.bn1`` holds weight, bias and statistics). Else it is a new module at the root,
named as its node is, which shares the tensors: they then have two names, and the rest of the library knows what to make
of tensors that others read.

Nodes that apply the same tensors in the same way are calls of one module. A layer gets a bias of its own for each node,
even if another node has the same weight: in a graph that costs nothing, and lets more norms go.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

from bnfuse.errors import InputError
from bnfuse.exported.nodes import TENSORS, Norm, give_bias, missing_bias, norm_of, without_writing
from bnfuse.model import tree
from bnfuse.model.copying import twin


class BatchNorm(nn.Module):
    """A batch norm in evaluation, for any number of axes."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            False, self.momentum, self.eps, False,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"eps={self.eps}, momentum={self.momentum}"


class InPlace(nn.Module):
    """An operator that works in place, or does the same on a copy."""

    def __init__(self, in_place: Any, on_a_copy: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        super().__init__()
        self.inplace = True
        self.in_place, self.on_a_copy, self.arguments, self.settings = in_place, on_a_copy, arguments, settings

    def forward(self, x: Tensor) -> Any:
        operator = self.in_place if self.inplace else self.on_a_copy
        return operator(x, *self.arguments, **self.settings)


@dataclass(frozen=True)
class Use:
    """The nodes of the given graph that apply a norm once, by name.

    Attributes:
        x: the node that is normalised.
        results: the nodes that have the result.
        nodes: all that go with the norm, in the order of the graph; the first is given its tensors.
    """

    x: str
    results: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass
class LiftedNorm:
    """A module that stands for a norm of the given graph.

    Attributes:
        at_home: whether it stands where its tensors are.
        places: the names of what it is given.
        read: the names under which the model holds these tensors, and those that stand beside them.
    """

    at_home: bool
    places: frozenset[str]
    read: frozenset[str]
    uses: list[Use] = field(default_factory=list)


@dataclass
class Lifted:
    """A graph laid out as modules.

    Attributes:
        module: shares the tensors of the given one, and has modules of its own.
        norms: by the name of the module.
        biases: the node of the given graph that each bias was made for, by the name of the bias.
        in_place: the node of the given graph that works in place, by the name of the module.
    """

    module: fx.GraphModule
    norms: dict[str, LiftedNorm] = field(default_factory=dict)
    in_place: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)


def lift(model: fx.GraphModule, kind: str) -> Lifted:
    """Lay a graph out.

    Args:
        model: is left as it is.
        kind: what the class of the module is called.

    Raises:
        InputError: it was made in training mode, or is prepared for quantisation.
    """
    called = [node.target for node in model.graph.nodes if node.op == "call_module"]
    shared = [model.get_submodule(name) for name in called]
    held = [value for node in model.graph.nodes if node.op == "get_attr" for value in [_attribute(model, node.target)]]
    module = twin(model, [*shared, *(value for value in held if isinstance(value, nn.Module))])
    assert isinstance(module, fx.GraphModule)
    type(module).__name__ = kind
    lifter = _Lifter(module, [node.name for node in model.graph.nodes])
    for norm in filter(None, map(norm_of, list(module.graph.nodes))):
        if norm.training and norm.given["running_mean"] is not None:
            raise InputError(
                f"{kind} was made in training mode: {norm.node.name} uses the statistics of the batch.\n"
                f"Call model.eval() first, then export or trace it."
            )
        lifter.add_norm(norm)
    for path in homes(module):
        lifter.add_arithmetic(path)
    for node in list(module.graph.nodes) if lifter.lifted.norms else ():
        lifter.add_bias(node)
        lifter.add_switch(node)
    lifter.finish()
    return lifter.lifted


def homes(model: nn.Module) -> list[str]:
    """The names of modules that hold the statistics of a norm, and that never run."""
    return [
        path
        for path, module in tree.named_modules(model)
        if path
        and tree.never_runs(module)
        and {"running_mean", "running_var"} <= {*module._parameters, *module._buffers}
    ]


def has_norms(model: fx.GraphModule) -> bool:
    """Whether a graph has norms that are no modules."""
    return any(norm_of(node) is not None for node in model.graph.nodes) or bool(homes(model))


@dataclass(frozen=True)
class _Part:
    """Nodes that read one tensor of others, beside those of their own module, and give one.

    Attributes:
        read: the nodes that give the tensors of the module.
    """

    nodes: list[fx.Node]
    x: fx.Node
    read: list[fx.Node]
    result: fx.Node

    def graph(self) -> fx.Graph:
        """The nodes as a graph of their own, which reads what its module holds."""
        inner = fx.Graph()
        values = {self.x: inner.placeholder("x")}
        values.update((node, inner.get_attr(str(node.target).rpartition(".")[2])) for node in self.read)
        for node in self.nodes:
            values[node] = inner.node_copy(node, values.__getitem__)
        inner.output(values[self.result])
        return inner

    @property
    def steps(self) -> list[Any]:
        """What the nodes do, by their places, so that it can be compared with what others do."""
        places: dict[fx.Node, Any] = {node: place for place, node in enumerate(self.nodes)}
        places |= {self.x: "x"} | {node: str(node.target) for node in self.read}
        steps = [(node.target, fx.map_arg((node.args, node.kwargs), places.__getitem__)) for node in self.nodes]
        return [*steps, places[self.result]]


def _part(nodes: list[fx.Node], path: str) -> _Part | None:
    """The nodes as a part of the graph, None if they do not read statistics, read or give more than one tensor, or run
    an inner graph."""
    if any(isinstance(node.target, HigherOrderOperator) for node in nodes):
        return None
    inside = set(nodes)
    given = dict.fromkeys(node for part in nodes for node in part.all_input_nodes if node not in inside)
    read = [node for node in given if node.op == "get_attr" and str(node.target).rpartition(".")[0] == path]
    others = [node for node in given if node not in read]
    results = [node for node in nodes if not inside.issuperset(node.users)]
    normalises = {f"{path}.running_mean", f"{path}.running_var"} <= {node.target for node in read}
    return _Part(nodes, others[0], read, results[0]) if normalises and len(others) == len(results) == 1 else None


class _Lifter:
    """Works on a module that shares its tensors with the given one."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        """
        Args:
            names: of the nodes of the given graph, in their order.
        """
        self.lifted = Lifted(module)
        self.module, self.graph = module, module.graph
        self.given = dict(zip(self.graph.nodes, names, strict=True))
        self.known: dict[Any, str] = {}

    def add_norm(self, norm: Norm) -> None:
        """Call a module in place of the node, if its tensors are those of the model."""
        targets = {place: self._tensor(node) for place, node in norm.given.items() if node is not None}
        if norm.others or None in targets.values() or not {"running_mean", "running_var"} <= targets.keys():
            return
        read: dict[str, str] = {place: str(target) for place, target in targets.items()}
        key = (tuple(sorted(read.items())), norm.eps, norm.momentum)
        if key not in self.known:
            self.known[key] = self._place(norm, read)
        name = self.known[key]
        self._call(name, norm.x, norm.results, (norm.node, *(user for user in norm.node.users if norm.unpacked)))

    def _call(self, name: str, x: fx.Node, results: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> None:
        """Call a module in place of the nodes that apply a norm."""
        last = results[0] if results else nodes[0]
        with self.graph.inserting_after(last):
            call = self.graph.call_module(name, (x,))
        call.meta = dict(last.meta)
        for node in results:
            node.replace_all_uses_with(call)
        given = self.given
        use = Use(given[x], tuple(map(given.__getitem__, results)), tuple(map(given.__getitem__, nodes)))
        self.lifted.norms[name].uses.append(use)
        given[call] = given[last]
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def _tensor(self, node: Any) -> str | None:
        """The name of the tensor that a node gives; None if it gives something else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        return str(node.target) if isinstance(_attribute(self.module, node.target), Tensor) else None

    def _place(self, norm: Norm, read: dict[str, str]) -> str:
        """Make the module of a norm; returns its name."""
        made = BatchNorm(norm.eps, norm.momentum)
        home = read["running_mean"].rpartition(".")[0]
        beside = self._is_home(home, read)
        if beside is not None:
            owner = self.module.get_submodule(home)
            made._parameters, made._buffers = owner._parameters, owner._buffers
            made._non_persistent_buffers_set = owner._non_persistent_buffers_set
            made.training = owner.training
            for place in TENSORS:
                if place not in made._buffers:
                    made._parameters.setdefault(place, None)
            name = home
        else:
            name = self._free(norm.node.name)
            for place in TENSORS:
                tensor = _attribute(self.module, read[place]) if place in read else None
                if tensor is None or isinstance(tensor, nn.Parameter):
                    made.register_parameter(place, tensor)
                else:
                    made.register_buffer(place, tensor, persistent=False)  # what it is elsewhere counts
        path, _, place = name.rpartition(".")
        self.module.get_submodule(path)._modules[place] = made
        tensors = frozenset({*read.values(), f"{home}.num_batches_tracked".lstrip("."), *(beside or ())})
        self.lifted.norms[name] = LiftedNorm(beside is not None, frozenset(read), tensors)
        return name

    def add_arithmetic(self, path: str) -> None:
        """Call a module in place of all nodes that were exported from the module of that name: a norm that is written
        as arithmetic. What it does is found out as of any module."""
        owner = self.module.get_submodule(path)
        functions = [node for node in self.graph.nodes if node.op in ("call_function", "call_method")]
        calls = [list(nodes) for own, nodes in itertools.groupby(functions, lambda n: _path(n) == path) if own]
        found = [_part(nodes, path) for nodes in calls]
        parts = [part for part in found if part is not None]
        inside = {node for nodes in calls for node in nodes}
        alone = all(inside.issuperset(node.users) for part in parts for node in part.read)
        alike = len({str(part.steps) for part in parts}) == 1 and len(parts) == len(found)
        if owner._modules or not alone or not alike:
            return
        made = fx.GraphModule(owner, parts[0].graph(), "BatchNorm")
        made._parameters, made._buffers = owner._parameters, owner._buffers
        made._non_persistent_buffers_set, made.training = owner._non_persistent_buffers_set, owner.training
        parent, _, place = path.rpartition(".")
        self.module.get_submodule(parent)._modules[place] = made
        held = {**owner._parameters, **owner._buffers}
        self.lifted.norms[path] = LiftedNorm(True, frozenset(held), frozenset(f"{path}.{name}" for name in held))
        for part in parts:
            self._call(path, part.x, [part.result], part.nodes)

    def _is_home(self, path: str, read: dict[str, str]) -> set[str] | None:
        """The names of further tensors that the module of that name holds, if it holds these and nothing else reads
        any of them; None if the norm cannot stand in its place."""
        if not path or any(target != f"{path}.{place}" for place, target in read.items()):
            return None
        owner = self.module.get_submodule(path)
        names = {f"{path}.{place}" for place in (*owner._parameters, *owner._buffers)}
        alone = [module for _, module in tree.named_modules(self.module)].count(owner) == 1
        if type(owner) is not nn.Module or owner._modules or not alone or not names.issuperset(read.values()):
            return None
        readers = {
            user
            for node in self.graph.nodes
            if node.op == "get_attr" and (node.target in names or node.target == path)
            for user in node.users
        }
        norms = [norm_of(user) for user in readers]
        alike = all(norm is not None and self._reads(norm) == read for norm in norms)
        return names - set(read.values()) if alike else None

    def _reads(self, norm: Norm) -> dict[str, str | None]:
        return {place: self._tensor(node) for place, node in norm.given.items() if node is not None}

    def add_bias(self, node: fx.Node) -> None:
        """Give a layer without a bias one of zeros."""
        found = missing_bias(node, self._shape)
        if found is None:
            return
        weight, size = found
        source = self._weight(weight)
        assert source is not None
        like = _attribute(self.module, source)
        path = self._layer(node) or source.rpartition(".")[0]
        name = self._free(f"{path}.bias" if path else f"{node.name}_bias")
        owner, _, place = name.rpartition(".")
        zeros = nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device), requires_grad=like.requires_grad)
        self.module.get_submodule(owner).register_parameter(place, zeros)
        with self.graph.inserting_before(node):
            bias = self.graph.get_attr(name)
        give_bias(node, bias)
        self.lifted.biases[name] = self.given[node]

    def add_switch(self, node: fx.Node) -> None:
        """Call a module in place of a node that works in place."""
        on_a_copy = without_writing(node)
        if on_a_copy is None:
            return
        x, *arguments = node.args
        name = self._free(node.name)
        self.module.add_module(name, InPlace(node.target, on_a_copy, tuple(arguments), dict(node.kwargs)))
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.lifted.in_place[name] = self.given[node]
        self.graph.erase_node(node)

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        if self._weight(node) is None:
            return None
        name = self._tensor(node)
        noted: Any = node.meta.get("val") if name is None else _attribute(self.module, name)
        fixed = isinstance(noted, Tensor) and all(isinstance(size, int) for size in noted.shape)
        return tuple(noted.shape) if fixed else None

    def _weight(self, node: Any) -> str | None:
        """The first floating tensor of the model that a node is made of; None if it is made of anything else."""
        waiting, seen, found = [node], set(), []
        while waiting:
            part = waiting.pop()
            if part in seen:
                continue
            seen.add(part)
            name = self._tensor(part)
            if name is not None:
                found += [name] if _attribute(self.module, name).is_floating_point() else []
            elif part.op != "call_function" or not part.all_input_nodes:
                return None
            else:
                waiting += part.all_input_nodes
        return min(found, default=None)

    def _layer(self, node: fx.Node) -> str:
        """The name of the module that a node was exported from, if there is one to hold a bias; else ""."""
        path = _path(node)
        held = _attribute(self.module, path) if path else None
        return path if type(held) is nn.Module else ""

    def _free(self, name: str) -> str:
        """The name, with a number if it is taken."""
        path, _, place = name.rpartition(".")
        owner = self.module.get_submodule(path)
        number, free = 0, place
        while hasattr(owner, free):
            number += 1
            free = f"{place}_{number}"
        return f"{path}.{free}" if path else free

    def finish(self) -> None:
        """Read nothing that only the norms read, since it goes with them."""
        read: set[str] = set().union(*(norm.read for norm in self.lifted.norms.values()))
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and node.target in read and not node.users:
                self.graph.erase_node(node)
        self.module.recompile()


def _path(node: fx.Node) -> str:
    """The name of the module that a node was exported from, "" if it is not known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _attribute(module: nn.Module, name: Any) -> Any:
    """What a module holds under a name with dots in it, None if it holds nothing."""
    held: Any = module
    for place in str(name).split("."):
        held = getattr(held, place, None)
    return held
