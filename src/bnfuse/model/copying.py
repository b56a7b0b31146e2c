"""Copying models where ``copy.deepcopy`` is not enough, and which tensors of a model share memory."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model import pytree, tree
from bnfuse.model.describe import one_line
from bnfuse.model.tree import SIMPLE


def copy_model(
    model: nn.Module, stand_ins: Mapping[int, Any] | None = None, held: Mapping[int, Tensor] | None = None
) -> nn.Module:
    """Copy a model deeply, also where ``copy.deepcopy`` fails or loses shared memory.

    Tensors that are part of an autograd graph, which layers compute and keep as attributes (old-style weight_norm), are
    copied without the graph. Parameters and buffers that share memory also share it in the copy.

    Args:
        stand_ins: what the copy holds in place of some modules and parameters of the model, by their ``id``.
        held: the result of ``held_tensors(model)``, if it is known.

    Raises:
        InputError: the model cannot be copied, or its copy shares parameters with it.
    """
    memo: dict[int, Any] = dict(stand_ins or {})
    for _, attribute in tree.plain_attributes(model):
        for _, value in pytree.tensors(attribute):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        with torch.inference_mode(False), torch.no_grad():
            copied: nn.Module = _copied(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied: {one_line(error)}. "
            f"Fuse it in place: bnfuse.fuse(model, inputs, inplace=True)."
        ) from error
    held = held_tensors(model) if held is None else held
    if not held.keys().isdisjoint(held_tensors(copied)):
        raise InputError(
            f"A copy of {type(model).__name__} shares parameters with it (a __deepcopy__ of its own), so it would "
            f"change with the copy. Fuse it in place: bnfuse.fuse(model, inputs, inplace=True)."
        )
    _share_memory(model, copied, shared_memory(held))
    return copied


_DICTIONARIES = frozenset({dict, OrderedDict})
_SEQUENCES = frozenset({list, tuple, set})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """The same as ``copy.deepcopy``, but faster for modules and their registries."""
    kind: Any = type(value)
    if kind in SIMPLE:
        return value
    known = memo.get(id(value), memo)
    if known is not memo:
        return known
    if kind in _DICTIONARIES:
        memo[id(value)] = made = kind()
        for key, item in value.items():
            new_key = key if type(key) in SIMPLE else copy.deepcopy(key, memo)
            made[new_key] = item if type(item) in SIMPLE else _copied(item, memo)
        return made
    if kind in _SEQUENCES and SIMPLE.issuperset(map(type, value)):
        if kind is tuple:
            return value
        memo[id(value)] = copied = value.copy()
        return copied
    if not isinstance(value, nn.Module) or not _is_copied_by_state(kind):
        return copy.deepcopy(value, memo)
    state = value.__getstate__() if hasattr(value, "__getstate__") else value.__dict__
    if type(state) is not dict:
        return copy.deepcopy(value, memo)
    memo.setdefault(id(memo), []).append(state)  # held, so that no new object gets the same id
    memo[id(value)] = module = object.__new__(kind)
    module.__setstate__({name: item if type(item) in SIMPLE else _copied(item, memo) for name, item in state.items()})
    return module


_COPYING = {
    "__deepcopy__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__new__",
}  # fmt: skip
"""Methods by which a class takes part in being copied."""


@functools.cache
def _is_copied_by_state(kind: type[nn.Module]) -> bool:
    """Whether objects of a class are copied by Python's default: a new object with a copy of the state."""
    if any(base.__dict__.get("__slots__") for base in kind.__mro__):
        return False
    own = {name for base in kind.__mro__ if base is not object for name in base.__dict__}
    return not own & _COPYING


def held_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Every parameter and buffer of a model, by its ``id``."""
    found: dict[int, Tensor] = {}
    for module in tree.modules(model):
        for registry in (module._parameters, module._buffers):
            for tensor in registry.values():
                if tensor is not None:
                    found[id(tensor)] = tensor
    return found


def shared_memory(held: Mapping[int, Tensor]) -> dict[int, int]:
    """Those of the tensors that share their storage with another: the storage's address by the ``id`` of the tensor."""
    storages: dict[int, list[Tensor]] = {}
    for tensor in held.values():
        if tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor):
            storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    return {id(tensor): storage for storage, tensors in storages.items() if len(tensors) > 1 for tensor in tensors}


def _share_memory(model: nn.Module, copied: nn.Module, shared: Mapping[int, int]) -> None:
    """Let the copies of tensors that share memory share one copy of it.

    Args:
        shared: the result of ``shared_memory`` for the model.
    """
    if not shared:
        return
    copies = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    storages: dict[int, torch.UntypedStorage] = {}
    for name, original in (*model.named_parameters(), *model.named_buffers()):
        if id(original) in shared and name in copies:
            key = shared[id(original)]
            storage = storages.setdefault(key, original.untyped_storage().clone())
            view = torch.empty(0, dtype=original.dtype, device=original.device)
            copies[name].data = view.set_(storage, original.storage_offset(), original.shape, original.stride())
