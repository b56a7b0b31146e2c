"""Copying models where ``copy.deepcopy`` is not enough, and which tensors of a model share memory."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model import pytree, tree
from bnfuse.model.describe import one_line
from bnfuse.model.tree import SIMPLE
from bnfuse.operators import is_dense


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
    held = held_tensors(model) if held is None else held
    computed = [tensor for tensor in held.values() if not tensor.is_leaf]
    for _, attribute in tree.plain_attributes(model):
        computed += [tensor for _, tensor in pytree.tensors(attribute) if not tensor.is_leaf]
    memo.update((id(tensor), tensor.detach().clone()) for tensor in computed)
    own = {*map(id, tree.modules(model)), *held}
    try:
        with torch.inference_mode(False), torch.no_grad():
            copier = _Copier(memo, own)
            copied: nn.Module = copier.copy(model)
            copier.rebind(tree.modules(model))
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied: {one_line(error)}. "
            f"Fuse it in place: bnfuse.fuse(model, inputs, inplace=True)."
        ) from error
    if not held.keys().isdisjoint(held_tensors(copied)):
        raise InputError(
            f"A copy of {type(model).__name__} shares parameters with it (a __deepcopy__ of its own), so it would "
            f"change with the copy. Fuse it in place: bnfuse.fuse(model, inputs, inplace=True)."
        )
    _share_memory(model, copied, shared_memory(held))
    return copied


_NOT_COPIED = frozenset({"_graph", "train", "eval"})
"""Attributes of a graph module that its copy gets otherwise, or not at all."""

_DICTIONARIES = frozenset({dict, OrderedDict})
_SEQUENCES = frozenset({list, tuple, set})
_TENSORS = frozenset({Tensor, nn.Parameter, nn.Buffer})


class _Copier:
    """Copies one model: the same as ``copy.deepcopy``, but faster, and for more than that copies.

    What refers to a module, parameter or buffer of the model without holding it (a weak reference, a function with the
    module in its closure) refers to the copy of it in the copy.
    """

    def __init__(self, memo: dict[int, Any], own: Collection[int]) -> None:
        """
        Args:
            memo: what the copy holds in place of an object, by its ``id``. It is added to.
            own: the ``id`` of every module, parameter and buffer of the model.
        """
        self.memo, self.own = memo, own

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
                new_key = key if type(key) in SIMPLE else self.copy(key)
                made[new_key] = item if type(item) in SIMPLE else self.copy(item)
            return made
        if kind in _SEQUENCES and SIMPLE.issuperset(map(type, value)):
            if kind is tuple:
                return value
            memo[id(value)] = copied = value.copy()
            return copied
        if isinstance(value, torch.fx.GraphModule) and kind not in weakref.ProxyTypes:
            return self._graph_module(value)
        if isinstance(value, nn.Module) and kind not in weakref.ProxyTypes and _is_copied_by_state(kind):
            pickled = hasattr(value, "__getstate__") and not _is_of_parametrize(kind, "__getstate__")
            state = value.__getstate__() if pickled else value.__dict__
            if type(state) is dict:
                return self._module(value, kind, state)
        by_kind = _BY_KIND.get(kind)
        if by_kind is not None:
            return by_kind(self, value)
        if kind in _TENSORS and (not is_dense(value) or value.is_quantized):
            return self._cloned(value)
        try:
            return copy.deepcopy(value, memo)
        except Exception:
            if isinstance(value, Tensor):
                return self._cloned(value)
            if isinstance(value, nn.Module) or self._holds_parts_of_the_model(value):
                raise
            memo.pop(id(value), None)
            return value  # a lock, an open file

    def rebind(self, modules: Sequence[nn.Module]) -> None:
        """Functions in attributes of modules whose class copies itself: ``copy.deepcopy`` shares all functions."""
        kinds: list[Any] = list(map(type, modules))
        if all(map(_is_copied_by_state, kinds)):
            return
        for module in modules:
            made = self.memo.get(id(module), module)
            for name, item in list(vars(module).items()) if made is not module else ():
                if type(item) is types.FunctionType and vars(made).get(name) is item:
                    vars(made)[name] = self.function(item)

    def _holds_parts_of_the_model(self, value: Any) -> bool:
        return bool(pytree.tensors(value)) or any(id(item) in self.own for item in tree.referred(value))

    def _module(self, value: nn.Module, kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
        self.memo.setdefault(id(self.memo), []).append(state)  # held, so that no new object gets the same id
        self.memo[id(value)] = module = object.__new__(kind)
        module.__setstate__({name: item if type(item) in SIMPLE else self.copy(item) for name, item in state.items()})
        return module

    def _graph_module(self, value: torch.fx.GraphModule) -> nn.Module:
        """A graph and what it runs on. ``copy.deepcopy`` loses hooks and attributes, and makes buffers of constants.

        A graph that ``torch.export`` has made hides the methods that set its training flag; a copy does not.
        """
        kind: Any = type(value)
        self.memo[id(value)] = made = kind.__new__(kind)  # of a class of its own, which is given the forward
        state = {name: item for name, item in vars(value).items() if name not in _NOT_COPIED}
        made.__dict__.update({name: self.copy(item) for name, item in state.items()})
        made.graph = copy.deepcopy(value.graph)
        type(made).__name__ = kind.__name__
        return made  # type: ignore[no-any-return]

    def _cloned(self, value: Tensor) -> Tensor:
        """A sparse, nested or quantised tensor, or one of a subclass, some of which ``copy.deepcopy`` does not take."""
        made = value.detach().clone()
        if isinstance(value, nn.Parameter):
            made = nn.Parameter(made, requires_grad=value.requires_grad)
        elif type(value) is nn.Buffer:
            made = nn.Buffer(made)
        if type(made) is not type(value):
            raise TypeError(f"a clone of a {type(value).__name__} is a {type(made).__name__}")
        self.memo[id(value)] = made
        made.__dict__.update(self.copy(value.__dict__))
        return made

    def in_list(self, value: list[Any]) -> list[Any]:
        made: list[Any] = []
        self.memo[id(value)] = made
        made.extend(map(self.copy, value))
        return made

    def in_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        made = tuple(map(self.copy, value))
        if all(map(is_, made, value)):
            return value
        known: tuple[Any, ...] = self.memo.setdefault(id(value), made)  # one of its members may hold it
        return known

    # References ---------------------------------------------------------------------------------------------------

    def refer(self, target: Any) -> Any:
        """What the copy refers to instead of an object: the copy of what the model holds, else the object itself."""
        return self.copy(target) if id(target) in self.own or id(target) in self.memo else target

    def reference(self, value: weakref.ref[Any]) -> weakref.ref[Any]:
        target = value()
        new = self.refer(target)
        return value if new is target else weakref.ref(new, value.__callback__)

    def method_reference(self, value: weakref.WeakMethod[Any]) -> weakref.WeakMethod[Any]:
        target = value()
        if target is None:
            return value
        return weakref.WeakMethod(types.MethodType(target.__func__, self.refer(target.__self__)))

    def proxy(self, value: Any) -> Any:
        try:
            target = value.__init__.__self__  # of the object that it stands for
        except ReferenceError:
            return value
        new = self.refer(target)
        return value if new is target else weakref.proxy(new)

    def by_key(self, value: Any) -> Any:
        self.memo[id(value)] = made = type(value)()
        made.update((self.refer(key), self.copy(item)) for key, item in list(value.items()))
        return made

    def by_value(self, value: Any) -> Any:
        self.memo[id(value)] = made = type(value)()
        made.update((self.copy(key), self.refer(item)) for key, item in list(value.items()))
        return made

    def weak_set(self, value: Any) -> Any:
        self.memo[id(value)] = made = type(value)(map(self.refer, list(value)))
        return made

    def method(self, value: types.MethodType) -> types.MethodType:
        return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))

    def partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        made = functools.partial(self.copy(value.func), *map(self.copy, value.args), **self.copy(value.keywords))
        made.__dict__.update(self.copy(value.__dict__))
        return made

    def function(self, value: types.FunctionType) -> types.FunctionType:
        """A function is shared, unless its closure or its defaults hold something of the model."""
        if not any(id(item) in self.own for item in tree.referred(value)):
            return value
        cells = tuple(map(self._cell, value.__closure__ or ()))
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self.memo[id(value)] = made
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(value, name):
                setattr(made, name, getattr(value, name))
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if tree.is_filled(old):
                cell.cell_contents = self.copy(old.cell_contents)
        made.__defaults__, made.__kwdefaults__ = self.copy(value.__defaults__), self.copy(value.__kwdefaults__)
        made.__dict__.update(self.copy(value.__dict__))
        return made

    def _cell(self, cell: types.CellType) -> types.CellType:
        """Functions that share a variable also do so in the copy."""
        return self.memo.setdefault(id(cell), types.CellType())  # type: ignore[no-any-return]


_BY_KIND: dict[type[Any], Callable[[_Copier, Any], Any]] = {
    list: _Copier.in_list,
    tuple: _Copier.in_tuple,
    weakref.ref: _Copier.reference,
    weakref.WeakMethod: _Copier.method_reference,
    **dict.fromkeys(weakref.ProxyTypes, _Copier.proxy),
    weakref.WeakKeyDictionary: _Copier.by_key,
    weakref.WeakValueDictionary: _Copier.by_value,
    weakref.WeakSet: _Copier.weak_set,
    types.MethodType: _Copier.method,
    types.FunctionType: _Copier.function,
    functools.partial: _Copier.partial,
}


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
    if _is_of_parametrize(kind, "__deepcopy__"):
        own.remove("__deepcopy__")
    return not own & _COPYING


def _is_of_parametrize(kind: type[nn.Module], name: str) -> bool:
    """Whether a method is one that PyTorch adds to the classes of parametrised layers.

    Its ``__deepcopy__`` does what Python's default does, and its ``__getstate__`` refuses to be pickled.
    """
    return getattr(getattr(kind, name, None), "__module__", None) == "torch.nn.utils.parametrize"


def twin(model: nn.Module, shared: Collection[nn.Module]) -> nn.Module:
    """A copy of the modules of a model that holds the very same tensors.

    Args:
        shared: modules that it also has in common with the model.

    Raises:
        InputError: it cannot be copied.
    """
    held = held_tensors(model)
    constants = [tensor for _, value in tree.plain_attributes(model) for _, tensor in pytree.tensors(value)]
    memo: dict[int, Any] = {id(item): item for item in (*held.values(), *constants, *shared)}
    try:
        made: nn.Module = _Copier(memo, {*map(id, tree.modules(model)), *held}).copy(model)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be copied: {one_line(error)}.") from error
    return made


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
        if is_dense(tensor) and not nn.parameter.is_lazy(tensor):
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
