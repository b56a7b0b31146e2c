"""Models of which each process holds a part: FSDP, tensor parallelism.

PyTorch's classes for them are looked up where they are loaded, and never loaded: a model has none of a class that
nobody has loaded, and loading them takes long.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bnfuse.model import tree
from bnfuse.model.copying import held_tensors


def sharding(model: nn.Module) -> str:
    """What of a model is held in parts, and how, as the beginning of a sentence; "" if nothing is.

    >>> sharding(nn.Linear(2, 2))
    ''
    """
    wrappers = tuple(_loaded("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel"))
    for name, module in tree.named_modules(model) if wrappers else ():
        if isinstance(module, wrappers):
            return f"{name or type(model).__name__} is sharded by FSDP"
    for key, tensor in held_tensors(model).items() if _is_loaded() else ():
        if _is_distributed(tensor):
            names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
            return f"{names[key]} is a DTensor"
    return ""


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process holds a part, at which all must ask for it; any other as it is."""
    if not _is_distributed(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


@contextlib.contextmanager
def in_shards(*models: nn.Module) -> Iterator[None]:
    """Before and after, modules that FSDP has sharded hold their shards only, as their last call may not leave them.

    FSDP keeps the parameters of its outermost module whole after a call. Who puts back a module's parameters puts back
    the shards, and FSDP must know.
    """
    kinds = tuple(_loaded("torch.distributed.fsdp", "FSDPModule"))
    modules: list[Any] = []
    if kinds:
        modules += [module for model in models for module in tree.modules(model) if isinstance(module, kinds)]
    for module in modules:
        module.reshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def _is_distributed(tensor: Tensor) -> bool:
    return _is_loaded() and isinstance(tensor, tuple(_loaded("torch.distributed.tensor", "DTensor")))


def _is_loaded() -> bool:
    return "torch.distributed.tensor" in sys.modules


def _loaded(module: str, *names: str) -> Iterator[type[Any]]:
    """The classes of these names, as far as they are loaded."""
    for name in names:
        found = getattr(sys.modules.get(module), name, None)
        if found is not None:
            yield found
