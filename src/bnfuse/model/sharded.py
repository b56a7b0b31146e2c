"""Models of which each process holds a part: FSDP, tensor parallelism.

PyTorch's classes for them are looked up where they are loaded, and never loaded: a model has none of a class that
nobody has loaded, and loading them takes long.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from bnfuse.model import tree
from bnfuse.model.copying import held_tensors


def sharding(model: nn.Module) -> str:
    """What of a model is held in parts, and how, as the beginning of a sentence; "" if nothing is.

    >>> sharding(nn.Linear(2, 2))
    ''
    """
    for name, module in tree.named_modules(model):
        for kind in ("FSDPModule", "FullyShardedDataParallel"):
            if isinstance(module, _loaded("torch.distributed.fsdp", kind)):
                return f"{name or type(model).__name__} is sharded by FSDP"
    held = held_tensors(model)
    for key, tensor in held.items():
        if isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor")):
            names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
            return f"{names[key]} is a DTensor"
    return ""


@contextlib.contextmanager
def in_shards(*models: nn.Module) -> Iterator[None]:
    """Before and after, modules that FSDP has sharded hold their shards only, as their last call may not leave them.

    FSDP keeps the parameters of its outermost module whole after a call. Who puts back a module's parameters puts back
    the shards, and FSDP must know.
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    modules: list[Any] = [module for model in models for module in tree.modules(model) if isinstance(module, kind)]
    for module in modules:
        module.reshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def _loaded(module: str, name: str) -> Any:
    """A class, or the empty tuple, of which nothing is an instance, where it is not loaded."""
    return getattr(sys.modules.get(module), name, ())
