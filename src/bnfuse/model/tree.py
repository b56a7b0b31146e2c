"""The modules of a model by name, and what they hold besides modules, parameters and buffers.

Many steps of one fuse ask for these. Inside `unchanging` a model is walked once and the answers are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})

SIMPLE = frozenset({str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size})
"""Classes of immutable values that hold no other object."""

_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name that it has.

    The same as ``model.named_modules(remove_duplicate=False)``, but faster on large models.

    >>> [name for name, _ in named_modules(nn.Sequential(nn.ReLU()))]
    ['', '0']
    """
    known = _unchanging.get(id(model))
    if known is not None:
        return list(known.modules)
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", "", found)
    return found


@dataclasses.dataclass
class _Known:
    """What walking a model that does not change has found."""

    modules: list[tuple[str, nn.Module]]
    attributes: list[tuple[str, Any]] | None = None


_unchanging: dict[int, _Known] = {}


@contextlib.contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """A context in which a model keeps its modules and attributes, so that it is walked only once.

    Whoever runs the model inside must put back what the run changed.
    """
    outer = id(model) in _unchanging
    if not outer:
        _unchanging[id(model)] = _Known(named_modules(model))
    try:
        yield
    finally:
        if not outer:
            del _unchanging[id(model)]


def _walk(module: nn.Module, name: str, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    found.append((name, module))
    for place, child in module._modules.items():
        if child is not None:
            path = prefix + place
            if child._modules:
                _walk(child, path, path + ".", found)
            else:
                found.append((path, child))


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module once, in the order of ``model.modules()``."""
    return distinct(named_modules(model))


def distinct(named: Iterable[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Every module of a list such as `named_modules` returns, once."""
    return list({id(module): module for _, module in named}.values())


def never_runs(module: nn.Module) -> bool:
    """True for a module that has no forward, and only holds what others read.

    >>> never_runs(nn.Module()), never_runs(nn.ReLU())
    (True, False)
    """
    own = "forward" in module.__dict__
    return not own and getattr(type(module), "forward", None) is nn.Module.forward


def plain_attributes(model: nn.Module) -> list[tuple[str, Any]]:
    """What the modules hold outside their registries of modules, parameters and buffers.

    Simple values, and containers of nothing but simple values, are left out.

    Returns:
        (name, value) pairs; the name begins with that of the module, such as ``"layers.0.cache"``.
    """
    known = _unchanging.get(id(model))
    if known is not None and known.attributes is not None:
        return known.attributes
    names = {id(module): name for name, module in reversed(named_modules(model))}
    found = [
        (f"{names[id(module)]}.{name}".lstrip("."), value)
        for module in modules(model)
        for name, value in module.__dict__.items()
        if type(value) not in SIMPLE and name not in _REGISTRIES and not holds_no_object(value)
    ]
    if known is not None:
        known.attributes = found
    return found


def holds_no_object(value: Any) -> bool:
    """Whether a value is a container of nothing but simple values. A vocabulary has a hundred thousand of them.

    >>> holds_no_object({"a": 1}), holds_no_object([1, [2]]), holds_no_object(1)
    (True, False, False)
    """
    if type(value) not in _CONTAINERS:
        return False
    return not value or SIMPLE.issuperset(map(type, value.values() if isinstance(value, dict) else value))


def referred(value: Any, deepest: int = 8) -> Iterator[Any]:
    """A value, and what it refers to as an object: as a container, a method, a weak reference, a function in whose
    closure or defaults something stands.

    Modules are not entered.

    >>> unit = nn.ReLU()
    >>> unit in list(referred({"act": [lambda x, act=unit: act(x)]}))
    True
    """
    waiting = [(value, deepest)]
    seen: dict[int, Any] = {}  # held, so that no new object gets the same id
    while waiting:
        item, depth = waiting.pop()
        if type(item) in SIMPLE or id(item) in seen:
            continue
        seen[id(item)] = item
        if type(item) in weakref.ProxyTypes:
            with contextlib.suppress(ReferenceError):
                item = item.__init__.__self__  # the object that it stands for
        yield item
        if depth and not isinstance(item, nn.Module):
            waiting += [(inner, depth - 1) for inner in _inside(item)]


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, (dict, list, tuple, set)):
        return () if holds_no_object(item) else item.values() if isinstance(item, dict) else item
    if isinstance(item, types.FunctionType):
        cells = (cell.cell_contents for cell in item.__closure__ or () if is_filled(cell))
        return (*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values())
    if isinstance(item, types.MethodType):
        return item.__self__, item.__func__
    if isinstance(item, functools.partial):
        return item.func, *item.args, *item.keywords.values()
    return (item(),) if isinstance(item, weakref.ref) else ()


def is_filled(cell: types.CellType) -> bool:
    """Whether a variable of a function's closure has a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
