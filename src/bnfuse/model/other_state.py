"""What a forward may change besides modules and their containers: helper objects, counters, generators, globals.

Looked at are the attributes of modules, and what the code of their classes refers to by a global name or in a closure.
Objects are followed into their own attributes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
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

_KNOWN = SIMPLE | {Tensor, nn.Parameter, types.FunctionType, types.BuiltinFunctionType}

_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes of every module, which are looked after elsewhere."""


class OtherState:
    """Such state, as it is now.

    Attributes:
        containers: what holds it, each with a copy: containers, and the ``__dict__`` of objects.
    """

    def __init__(self, modules: Iterable[nn.Module], attributes: Iterable[tuple[str, Any]]) -> None:
        """
        Args:
            attributes: all attributes of the modules, by name.
        """
        self.containers: list[tuple[Any, Any]] = []
        self._iterators: list[tuple[Callable[[Any], None], Any, Any]] = []
        self._generators: list[Callable[[], object]] = []
        self._seen: dict[int, Any] = {}
        iterators = False
        for name, value in attributes:
            if type(value) not in _KNOWN and name not in _OF_MODULES and not isinstance(value, _SKIPPED):
                iterators |= _is_iterator(value)
                self._add(value, 0, None, own=True)
        for module in modules if iterators else ():
            for name, value in list(vars(module).items()):
                if type(value) not in SIMPLE and _is_iterator(value):
                    self._add(value, 0, functools.partial(vars(module).__setitem__, name), own=True)
        for kind in {type(module) for module in modules}:
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
        if type(value) in SIMPLE or isinstance(value, _SKIPPED) or id(value) in self._seen or depth > _DEEPEST:
            return
        if _is_iterator(value) and put is None:
            return
        self._seen[id(value)] = value  # held, so that no new object gets the same id
        if isinstance(value, _CONTAINERS):
            if not (own and depth == 0 and isinstance(value, (dict, list, set))):
                self.containers.append((value, value.copy()))
            items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
            for key, item in items if not isinstance(value, set) else ():
                if type(item) not in SIMPLE:
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
        elif _is_plain_object(value):
            self._add(value.__dict__, depth, None)

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
        for put_back in self._generators:
            put_back()


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


def _is_plain_object(value: Any) -> bool:
    """True for an object of a class of the caller's, a namespace, or a container that is made of attributes."""
    module = type(value).__module__.partition(".")[0]
    if isinstance(value, (types.SimpleNamespace, MutableMapping)):
        return hasattr(value, "__dict__")
    return module not in ("torch", "builtins", "numpy") and module not in sys.stdlib_module_names and hasattr(
        value, "__dict__"
    )  # fmt: skip


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
