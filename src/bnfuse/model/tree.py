"""A model as a tree of modules: every module under every name, and what modules hold beside their registries.

Many steps of one fuse ask for these. Inside :func:`unchanging` a model is walked once and the answers are kept.
"""

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import (
    Iterable,
    Iterator,
)
from typing import Any

import torch
from torch import nn

_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})


SIMPLE = frozenset({str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size})
"""Classes of what never changes and holds nothing."""

_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name that it has: ``model.named_modules(remove_duplicate=False)``, in a plain walk.

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
    modules: list[tuple[str, nn.Module]]
    attributes: list[tuple[str, Any]] | None = None


_unchanging: dict[int, _Known] = {}


@contextlib.contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Inside, the model is walked once: whoever runs it puts its modules and attributes back."""
    outer = id(model) in _unchanging
    if not outer:
        _unchanging[id(model)] = _Known(named_modules(model))
    try:
        yield
    finally:
        if not outer:
            _unchanging.pop(id(model), None)  # another thread may have fused the same model


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
    """Every module of such a list once."""
    return list({id(module): module for _, module in named}.values())


def plain_attributes(model: nn.Module) -> list[tuple[str, Any]]:
    """What the modules hold beside their registries, without numbers, texts and containers of nothing else.

    Returns:
        (name, value), the name with that of the module: ``"layers.0.cache"``.
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
    """True for a container of nothing but numbers and texts, of which it may hold a hundred thousand.

    >>> holds_no_object({"a": 1}), holds_no_object([1, [2]]), holds_no_object(1)
    (True, False, False)
    """
    if type(value) not in _CONTAINERS:
        return False
    return not value or SIMPLE.issuperset(map(type, value.values() if isinstance(value, dict) else value))
