"""Models that are prepared for quantisation: they measure ranges of numbers, or round numbers as integers would be."""

from __future__ import annotations

from torch import nn

from bnfuse.model import tree

_WATCHERS = frozenset({"ObserverBase", "FakeQuantizeBase", "AffineQuantizedObserverBase"})
"""Base classes of such modules, in PyTorch and in torchao."""


def is_watcher(module: nn.Module) -> bool:
    """Whether a module notes how large numbers become, or rounds them.

    >>> class ObserverBase(nn.Module):
    ...     pass
    >>> is_watcher(ObserverBase()), is_watcher(nn.ReLU())
    (True, False)
    """
    return any(base.__name__ in _WATCHERS for base in type(module).__mro__)


def rounds_its_weight(module: nn.Module) -> bool:
    """Whether a layer of quantisation-aware training rounds its weight, as a ``ConvBn2d`` does."""
    watcher = module._modules.get("weight_fake_quant")
    return watcher is not None and is_watcher(watcher)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has a watcher for what it makes."""
    watcher = module._modules.get("activation_post_process")
    return watcher is not None and is_watcher(watcher)


def is_prepared(model: nn.Module) -> bool:
    """Whether any part of a model is prepared for quantisation."""
    return any(map(is_watcher, tree.modules(model)))
