"""Carrying over to the given graph what fusing has changed in the laid-out one: norms that went, biases that came."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx, nn

from bnfuse.exported.lifting import Lifted, LiftedNorm, Use
from bnfuse.exported.nodes import TENSORS, give_bias, norm_of, set_argument, without_writing

Reader = Callable[[str, fx.Node], fx.Node]
"""Makes a node that gives the parameter of a name, in front of another node."""


@dataclass
class Difference:
    """What is to change in the given graph.

    Attributes:
        gone: where norms were applied that went.
        added: what a node is given that it did without: its name, the argument, the name of the new parameter.
        unread: the names of tensors that go if nothing else reads them.
        on_a_copy: the names of nodes that no longer work in place.
    """

    gone: list[Use]
    added: list[tuple[str, str, str]]
    unread: set[str]
    on_a_copy: list[str]


def settle(lifted: Lifted, fused: nn.Module) -> Difference:
    """Take back what laying out has put into a module, and say what has changed.

    Args:
        fused: ``lifted.module`` after fusing, or a copy of it. Norms that stay leave their tensors where they were, and
            biases that are zero go.
    """
    found = Difference([], [], set(), [])
    for name, record in lifted.norms.items():
        owner, place = _owner(fused, name)
        norm = owner._modules.pop(place)
        if norm is None or isinstance(norm, nn.Identity):
            found.gone += record.uses
            found.unread |= record.read
            continue
        holder = _put_back(norm, fused, name, record)
        for argument in TENSORS:
            new = norm._parameters.get(argument) if argument not in record.places else None
            if new is not None:
                label = f"{name}.{argument}" if record.at_home else f"{name}_{argument}"
                holder.register_parameter(label.rpartition(".")[2], new)
                found.added += [(use.nodes[0], argument, label) for use in record.uses]
    for name, node in lifted.biases.items():
        owner, place = _owner(fused, name)
        bias = owner._parameters[place]
        if bias is not None and bool(bias.any()):
            found.added.append((node, "bias", name))
        else:
            del owner._parameters[place]
    for name, node in lifted.in_place.items():
        owner, place = _owner(fused, name)
        if not owner._modules.pop(place).inplace:  # type: ignore[union-attr]
            found.on_a_copy.append(node)
    return found


def _put_back(norm: nn.Module, fused: nn.Module, name: str, record: LiftedNorm) -> nn.Module:
    """Put the tensors of a norm that stays where they were; returns the module that is to hold new ones."""
    if not record.at_home:
        return fused  # which has them anyway
    owner, place = _owner(fused, name)
    home = owner._modules[place] = nn.Module()
    for argument, parameter in norm._parameters.items():
        if parameter is not None or argument in record.places:
            home._parameters[argument] = parameter
    home._buffers, home._non_persistent_buffers_set = norm._buffers, norm._non_persistent_buffers_set
    home.training = norm.training
    return home


def rewritten(
    graph: fx.Graph, difference: Difference, reader: Callable[[fx.Graph], Reader]
) -> tuple[fx.Graph, dict[str, str]]:
    """A copy of a graph with the difference in it.

    Args:
        graph: the given one.
        reader: makes from the copy the function that makes nodes in it.

    Returns:
        The copy; and the name of each node of the graph in the copy, or of the one that stands for it there.
    """
    changed = copy.deepcopy(graph)
    nodes = {old.name: new for old, new in zip(graph.nodes, changed.nodes, strict=True)}
    read = reader(changed)
    for name, argument, parameter in difference.added:
        node = nodes[name]
        given = read(parameter, node)
        if norm_of(node) is None:
            give_bias(node, given)
        else:
            set_argument(node, argument, given)
    for name in difference.on_a_copy:
        nodes[name].target = without_writing(nodes[name])
    stands_for: dict[fx.Node, fx.Node] = {}
    for use in difference.gone:
        x = _last(nodes[use.x], stands_for)
        for name in use.results:
            nodes[name].replace_all_uses_with(x)
            stands_for[nodes[name]] = x
        for name in reversed(use.nodes):
            changed.erase_node(nodes[name])
    return changed, {name: _last(node, stands_for).name for name, node in nodes.items()}


def _last(node: fx.Node, stands_for: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in stands_for:
        node = stands_for[node]
    return node


def getting(graph: fx.Graph) -> Reader:
    """Reads parameters from the module that has the graph, anew each time."""

    def read(name: str, node: fx.Node) -> fx.Node:
        with graph.inserting_before(node):
            return graph.get_attr(name)

    return read


def drop(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Take tensors of these names out of a module, with the nodes that give them, unless something reads them."""
    for name in names:
        nodes = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == name]
        if any(node.users for node in nodes):
            continue
        for node in nodes:
            module.graph.erase_node(node)
        owner: nn.Module | None = module
        *path, place = name.split(".")
        for part in path:
            owner = None if owner is None else owner._modules.get(part)
        if owner is not None and hasattr(owner, place):  # else it went with the norm
            delattr(owner, place)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, place = name.rpartition(".")
    return module.get_submodule(path), place
