"""What a forward may change besides modules and their containers: helper objects, counters, generators, globals.

Looked at are the attributes of modules, and what the code of their classes refers to by a global name or in a closure.
Objects are followed into their own attributes.
"""

from __future__ import annotations

import array
import contextlib
import copy
import functools
import itertools
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.model.tree import SIMPLE

_DEEPEST = 3

_CONTAINERS = (dict, list, set, deque)

_SKIPPED = (
    Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
    functools.partial, torch.Size, torch.dtype, torch.device,
)  # fmt: skip

_CLOSED = SIMPLE | {tuple}
"""Classes of values that are not looked into."""

_KNOWN = _CLOSED | {Tensor, nn.Parameter, types.FunctionType, types.BuiltinFunctionType}

OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes of every module, which are looked after elsewhere."""


class OtherState:
    """Such state, as it is now.

    Attributes:
        containers: what holds it, each with a copy: containers, and the ``__dict__`` of objects.
        tensors: those that were found.
    """

    def __init__(self, modules: Iterable[nn.Module], names: Sequence[str], values: Sequence[Any]) -> None:
        """
        Args:
            names, values: of all attributes of the modules.
        """
        self.containers: list[tuple[Any, Any]] = []
        self._iterators: list[tuple[Callable[[Any], None], Any, Any]] = []
        self._generators: list[Callable[[], object]] = []
        self._places: list[tuple[Any, str, Any]] = []  # attributes of classes, and of objects with slots
        self._arrays: list[tuple[Any, Any]] = []  # of numbers, each with a copy
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {}
        modules = list(modules)
        self._modules = set(map(id, modules))
        iterators = False
        for value in _unusual(names, values):
            if not isinstance(value, _SKIPPED):
                iterators |= _is_iterator(value)
                self._add(value, 0, None, own=True)
        for module in modules if iterators else ():
            for name, value in list(vars(module).items()):
                if type(value) not in SIMPLE and _is_iterator(value):
                    self._add(value, 0, functools.partial(vars(module).__setitem__, name), own=True)
        kinds: dict[type, None] = dict.fromkeys(map(type, modules))
        for kind in dict.fromkeys(itertools.chain.from_iterable(kind.__mro__ for kind in kinds)):
            if base_is_of_the_caller(kind):
                for name, value in list(vars(kind).items()):
                    if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__"):
                        self._places.append((kind, name, value))
                        self._add(value, 0, None)
        for kind in kinds:
            for holder, name in _referred(kind):
                self._of_code(holder, name)

    def _of_code(self, holder: Any, name: str) -> None:
        if isinstance(holder, types.CellType):
            with contextlib.suppress(ValueError):  # an empty one
                self._add(holder.cell_contents, 0, functools.partial(setattr, holder, "cell_contents"))
        elif name in holder:
            self._add(holder[name], 0, functools.partial(holder.__setitem__, name))

    def _add(self, value: Any, depth: int, put: Callable[[Any], None] | None, own: bool = False) -> None:
        """
        Args:
            put: puts another object in the place of the value.
            own: whether a module holds it; then its containers are looked after already.
        """
        if type(value) in _CLOSED or id(value) in self._seen or depth > _DEEPEST:
            return
        if isinstance(value, Tensor):
            self.tensors.append(value)
        hidden = isinstance(value, nn.Module) and id(value) not in self._modules
        if hidden or (isinstance(value, types.FunctionType) and vars(value)):
            self._seen[id(value)] = value
            self._add(vars(value), depth, None)
            return
        if isinstance(value, _SKIPPED):
            return
        if _is_iterator(value) and put is None:
            return
        self._seen[id(value)] = value  # held, so that no new object gets the same id
        if isinstance(value, _CONTAINERS):
            if not (own and depth == 0 and isinstance(value, (dict, list, set))):
                self.containers.append((value, plain_copy(value)))
            items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
            for key, item in items if not isinstance(value, set) else ():
                if type(item) not in _CLOSED:
                    self._add(item, depth + 1, functools.partial(_put, value, key), own=False)
        elif isinstance(value, torch.Generator):
            self._generators.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._generators.append(functools.partial(value.setstate, value.getstate()))
        elif _is_numpy_generator(value):
            self._generators.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif _is_iterator(value):
            with contextlib.suppress(Exception):  # a generator cannot be copied
                if put is not None:
                    self._iterators.append((put, value, copy.copy(value)))
        elif _is_numbers(value):
            self._arrays.append((value, copy.copy(value)))
        elif is_plain_object(value):
            if hasattr(value, "__dict__"):
                self._add(value.__dict__, depth, None)
            kind: Any = type(value)
            for name in _slots(kind):
                held = getattr(value, name, _MISSING)
                self._places.append((value, name, held))
                if held is not _MISSING:
                    self._add(held, depth + 1, functools.partial(setattr, value, name))

    def changed_places(self) -> Iterator[tuple[str, Any]]:
        """What attributes of classes and of objects with slots hold by now, and arrays with other numbers."""
        for holder, name, before in self._places:
            now = _held_by(holder, name)
            if now is not before:
                kind = holder if isinstance(holder, type) else type(holder)
                yield f"{kind.__name__}.{name}", None if now is _MISSING else now
        for numbers, before in self._arrays:
            if bytes(memoryview(numbers)) != bytes(memoryview(before)):
                yield f"a {type(numbers).__name__} of the model", None

    def changed_iterators(self) -> Iterator[Any]:
        """Those that are no longer where they were."""
        for _, value, before in self._iterators:
            if _place(value) != _place(before):
                yield value

    def restore(self) -> None:
        """Put iterators and generators back; the containers are up to the caller."""
        for put, value, before in self._iterators:
            if _place(value) != _place(before):
                put(before)
        for holder, name, held in self._places:
            if _held_by(holder, name) is not held:
                delattr(holder, name) if held is _MISSING else setattr(holder, name, held)
        for numbers, held in self._arrays:
            if bytes(memoryview(numbers)) != bytes(memoryview(held)):
                numbers[:] = held
        for put_back in self._generators:
            put_back()


def plain_copy(container: Any) -> Any:
    """What a container holds, in one of Python's own: a class of the caller's may make something of what it hands out.

    >>> class Lookup(dict):
    ...     def __getitem__(self, key):
    ...         return super().__getitem__(key)()
    >>> plain_copy(Lookup(empty=list)) == {"empty": list}
    True
    """
    if isinstance(container, dict):
        return dict(container.items())
    return set(container) if isinstance(container, set) else list(container)


def _unusual(names: Sequence[str], values: Sequence[Any]) -> Iterator[Any]:
    """The attributes that not every module has, and of no simple class. There are thousands of the others."""
    kinds = list(map(type, values))
    unusual_names, unusual_kinds = set(names) - OF_MODULES, set(kinds) - _KNOWN
    chosen = map(and_, map(unusual_names.__contains__, names), map(unusual_kinds.__contains__, kinds))
    return itertools.compress(values, chosen)


def _held_by(holder: Any, name: str) -> Any:
    return vars(holder).get(name, _MISSING) if isinstance(holder, type) else getattr(holder, name, _MISSING)


def base_is_of_the_caller(kind: type) -> bool:
    """True for a class that is not PyTorch's or Python's."""
    return kind.__module__.partition(".")[0] not in ("torch", "torchvision", "builtins", "typing", "abc")


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return tuple(name for name in found if not name.startswith("__"))


def _is_numbers(value: Any) -> bool:
    """True for an array of numbers that can be written to."""
    if isinstance(value, (array.array, bytearray)):
        return True
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray:
        return False
    plain = not value.dtype.hasobject and bool(value.flags.writeable) and bool(value.ndim)
    return plain and bool(value.flags.c_contiguous) and value.nbytes <= _LARGEST


_LARGEST = 1 << 20
"""So many bytes of an array, at most, are looked at."""

_MISSING = object()


def _put(container: Any, key: Any, value: Any) -> None:
    container[key] = value


def _is_iterator(value: Any) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, types.GeneratorType)


def _place(iterator: Any) -> Any:
    """What tells how far an iterator is."""
    try:
        return repr(iterator.__reduce__())
    except Exception:  # noqa: BLE001 (whatever its class raises)
        return None


def _is_numpy_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator)


def is_plain_object(value: Any) -> bool:
    """True for an object of a class of the caller's, a namespace, or a container that is made of attributes."""
    module = type(value).__module__.partition(".")[0]
    if isinstance(value, (types.SimpleNamespace, MutableMapping, threading.local)):
        return hasattr(value, "__dict__")
    if module in ("torch", "builtins", "numpy") or module in sys.stdlib_module_names:
        return False
    kind: Any = type(value)
    return hasattr(value, "__dict__") or bool(_slots(kind))


@functools.cache
def code_of(kind: Any) -> tuple[types.FunctionType, ...]:
    """The functions of a class of modules that is not PyTorch's."""
    found = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "torchvision", "builtins"):
            found += [value for value in vars(base).values() if isinstance(value, types.FunctionType)]
    return tuple(found)


def _referred(kind: Any) -> Iterator[tuple[Any, str]]:
    """Where the code of a class finds what is not its own: global names and cells of closures, with the name."""
    for function in code_of(kind):
        for name in _names(function.__code__):
            yield function.__globals__, name
        for cell in function.__closure__ or ():
            yield cell, ""


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names in a function, and in those inside of it, that may be global."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys((*code.co_names, *(name for part in inner for name in _names(part)))))
