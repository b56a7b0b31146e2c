"""Copying models where ``copy.deepcopy`` is not enough, and which tensors of a model share memory."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping
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
    copied without the graph. Parameters and buffers that share memory also share it in the copy. Functions in
    attributes (a replaced forward, hooks) that hold parts of the model, in variables from around them or as default
    arguments, are made anew for the copy, since ``copy.deepcopy`` would share them.

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
            copied: nn.Module = _Copier(model, memo).copy(model)
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


class _Copier:
    """The same as ``copy.deepcopy`` for one model, but faster for modules, and for functions that hold parts of it."""

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.model, self.memo = model, memo

    def copy(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind in SIMPLE:
            return value
        memo = self.memo
        known = memo.get(id(value), memo)
        if known is not memo:
            return known
        if kind in _DICTIONARIES:
            memo[id(value)] = made = kind()
            for key, item in value.items():
                new_key = key if type(key) in SIMPLE else copy.deepcopy(key, memo)
                made[new_key] = item if type(item) in SIMPLE else self.copy(item)
            return made
        if kind in _SEQUENCES:
            return self._sequence(value, kind)
        if kind is types.FunctionType:
            return self._function(value) if self._holds_parts(value, {}) else value
        if kind is types.MethodType:
            return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))
        if kind is functools.partial:
            new = functools.partial(self.copy(value.func), *self.copy(value.args), **self.copy(value.keywords))
            new.__dict__.update(self.copy(value.__dict__))
            return new
        if not isinstance(value, nn.Module) or not _is_copied_by_state(kind):
            return copy.deepcopy(value, memo)
        state = value.__getstate__() if hasattr(value, "__getstate__") else value.__dict__
        if type(state) is not dict:
            return copy.deepcopy(value, memo)
        memo.setdefault(id(memo), []).append(state)  # held, so that no new object gets the same id
        memo[id(value)] = module = object.__new__(kind)
        module.__setstate__({n: item if type(item) in SIMPLE else self.copy(item) for n, item in state.items()})
        return module

    def _sequence(self, value: Any, kind: Any) -> Any:
        plain = SIMPLE.issuperset(map(type, value))
        if kind is list:
            made: list[Any] = []
            self.memo[id(value)] = made
            made.extend(value if plain else map(self.copy, value))
            return made
        if plain:
            return value if kind is tuple else self.memo.setdefault(id(value), value.copy())
        items = [self.copy(item) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return self.memo.setdefault(id(value), value if same and kind is tuple else kind(items))

    def _function(self, old: types.FunctionType) -> types.FunctionType:
        """The same function with the copies of the parts that it holds."""
        cells = None if old.__closure__ is None else tuple(map(self._cell, old.__closure__))
        new = types.FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)
        self.memo[id(old)] = new  # before what it holds is copied, which may hold the function
        new.__defaults__, new.__kwdefaults__ = self._kept_parts(old.__defaults__), self._kept_parts(old.__kwdefaults__)
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(old, name):
                setattr(new, name, getattr(old, name))
        new.__dict__.update({name: self._part(item) for name, item in old.__dict__.items()})
        for cell, made in zip(old.__closure__ or (), cells or (), strict=True):
            if made is not cell and not _is_filled(made) and _is_filled(cell):
                made.cell_contents = self._part(cell.cell_contents)
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A cell for the copy, still empty; the cell itself if it holds no part of the model."""
        if not _is_filled(cell) or not self._holds_parts(cell.cell_contents, {}):
            return cell
        made: types.CellType = self.memo.setdefault(id(cell), types.CellType())
        return made

    def _part(self, value: Any) -> Any:
        return self.copy(value) if self._holds_parts(value, {}) else value

    def _kept_parts(self, held: Any) -> Any:
        if isinstance(held, tuple):
            return tuple(map(self._part, held))
        return {name: self._part(item) for name, item in held.items()} if isinstance(held, dict) else held

    def _holds_parts(self, value: Any, seen: dict[int, Any]) -> bool:
        """Whether a value is a part of the model, or a function, method or container that holds one."""
        if isinstance(value, (nn.Module, Tensor)):
            return id(value) in self._parts
        if type(value) in SIMPLE or id(value) in seen:
            return False
        seen[id(value)] = value
        return any(self._holds_parts(item, seen) for item in _held_by(value))

    @functools.cached_property
    def _parts(self) -> set[int]:
        """Modules, parameters and buffers of the model, by their ``id``."""
        return {*map(id, tree.modules(self.model)), *held_tensors(self.model)}


def _held_by(value: Any) -> Iterable[Any]:
    """What functions, bound methods, partial functions and containers hold; nothing for any other value."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return (*cells, *defaults, *value.__dict__.values())
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if type(value) in _DICTIONARIES:
        return tuple(value.values())
    return tuple(value) if type(value) in _SEQUENCES else ()


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where there is nothing)
    except ValueError:
        return False
    return True


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
