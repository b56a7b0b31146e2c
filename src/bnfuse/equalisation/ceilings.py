"""ReLU6 and its like: a bound from above that differs from channel to channel.

``min(max(x, 0), 6)`` passes no scale. With a bound per channel it does:
``min(max(s*x, 0), 6*s) = s*min(max(x, 0), 6)`` for any ``s > 0``. So a module that holds the bounds is put before the
function: in the place of the ``nn.Identity`` that a removed norm has left there, else together with the function's own
module. The function itself stays what it is, as long as no bound exceeds its own, and that is a matter of the common
factor of all scales, which is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bnfuse.capture.run import Run
from bnfuse.graph.graph import Node
from bnfuse.model import tree
from bnfuse.model.ceiling import Ceiling
from bnfuse.model.marks import mark_norm, mark_of


@dataclass(frozen=True)
class Place:
    """Where a ceiling goes.

    Attributes:
        names: of the module that it takes the place of, all of them.
        shape: of the bounds.
        height: the bound of the function after it.
        before: whether the module stays, behind the ceiling.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    height: float
    before: bool


def places(model: nn.Module, run: Run) -> list[Place]:
    """Where functions are bounded from above at a number, and a module stands there that runs once."""
    names: dict[int, list[str]] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module), []).append(name)
    found: dict[tuple[str, ...], Place] = {}
    for node, height in _bounded(run):
        x = node.inputs[0]
        calls = [call for call in run.calls if type(call.module) is nn.Identity and x in call.outputs]
        own = [] if not (node.call.is_standard and len(node.call.nodes) == 1) else [node.call]
        for call in (*calls, *own):
            once = sum(other.module is call.module for other in run.calls) == 1
            if once and "" not in names.get(id(call.module), [""]) and len(x.shape) > 1 and len(x.consumers) == 1:
                place = tuple(names[id(call.module)])
                found[place] = Place(place, (x.shape[1], *[1] * (len(x.shape) - 2)), height, call is node.call)
                break
    return list(found.values())


def _bounded(run: Run) -> Iterator[tuple[Node, float]]:
    for node in run.nodes:
        if node.operator == "relu6":
            yield node, 6.0
        elif node.operator == "hardtanh" and node.argument("min_val") == 0:
            yield node, float(node.argument("max_val", 1.0))
        elif node.operator == "clamp" and node.argument("min") == 0 and node.argument("max") is not None:
            yield node, float(node.argument("max"))


def insert(model: nn.Module, where: list[Place]) -> nn.Module:
    """Put ceilings into a model, in place; its outputs stay as they are."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for place in where:
        ceiling = Ceiling(torch.full(place.shape, place.height, dtype=like.dtype, device=like.device))
        old = model.get_submodule(place.names[0])
        new = nn.Sequential(ceiling, old) if place.before else ceiling
        new.train(old.training)
        mark = mark_of(old)
        kept = mark.kept if mark.instead_of else ("",) if place.before else ()
        mark_norm(new, mark.instead_of or type(old).__name__, kept, place.shape)
        for name in place.names:
            model.set_submodule(name, new)
    return model


def level(model: nn.Module, where: list[Place]) -> nn.Module:
    """Take the ceilings that bound no channel lower than the function does out again, in place."""
    for place in where:
        module = model.get_submodule(place.names[0])
        ceiling = module.get_submodule("0") if place.before else module
        assert isinstance(ceiling, Ceiling)
        if not bool((ceiling.upper < place.height).any()):
            old = module.get_submodule("1") if place.before else nn.Identity().train(module.training)
            mark = mark_of(module)
            if not place.before and mark.instead_of != "Identity":
                mark_norm(old, mark.instead_of, mark.kept)
            for name in place.names:
                model.set_submodule(name, old)
    return model
