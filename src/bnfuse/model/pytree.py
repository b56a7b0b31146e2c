"""Finding and replacing the tensors in whatever a model takes or returns.

A model may return a tensor, nested containers of tensors, a dataclass, a Hugging Face ``ModelOutput``, or an object of
its own class. Containers and plain data objects are searched. Modules, classes, functions and objects of the standard
library (loggers, locks, paths, iterators) are not.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet, Set
from typing import Any, TypeGuard

from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]

DEEPEST = 40
"""How many containers may be nested; what is deeper is left alone."""

_ATOMS = (str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType, nn.Module)
"""Classes whose objects are not searched."""

_SEQUENCES = (list, tuple, deque)


def tensors(tree: object) -> list[tuple[str, Tensor]]:
    """Return every tensor in ``tree`` with its path, in a fixed order.

    A path is the expression behind the variable: ``"[0]"``, ``".logits"``, ``"['out'][1]"``. It is ``""`` for a bare
    tensor and ``"{0}"`` for the first member of a set. A container that occurs twice is searched once.

    >>> import torch
    >>> [path for path, _ in tensors({"out": torch.zeros(1), "aux": [torch.zeros(1), None]})]
    ["['out']", "['aux'][0]"]
    """
    if isinstance(tree, Tensor):
        return [("", tree)]
    if type(tree) is tuple and len(tree) == 1 and isinstance(tree[0], Tensor):  # what most modules are called with
        return [("[0]", tree[0])]
    found: list[tuple[str, Tensor]] = []
    _collect(tree, "", 0, {}, found)
    return found


def map_tensors(tree: Any, function: Function) -> Any:
    """Return ``tree`` with every tensor replaced by ``function(tensor)``.

    Containers, and data objects that hold tensors or containers, become shallow copies of the same class, so that
    writing to the new tree does not change the old one. Everything else is shared, also an object that cannot be
    copied. A tensor that occurs several times is mapped once, and the result takes its place each time.

    >>> import torch
    >>> map_tensors((torch.ones(1), "a"), lambda tensor: tensor + 1)
    (tensor([2.]), 'a')
    """
    if isinstance(tree, Tensor):
        return function(tree)
    return _Mapper(function).map(tree, 0)


def _collect(tree: object, path: str, depth: int, seen: dict[int, object], found: list[tuple[str, Tensor]]) -> None:
    if isinstance(tree, Tensor):
        found.append((path, tree))
    elif depth < DEEPEST and not _is_atom(tree) and id(tree) not in seen:
        seen[id(tree)] = tree  # held, so that no new object gets the same id
        for step, child in _children(tree):
            _collect(child, path + step, depth + 1, seen, found)


def _children(tree: object) -> Iterator[tuple[str, object]]:
    """The members of a container or data object, each with its step of the path."""
    if isinstance(tree, Mapping):
        names = [field.name for field in dataclasses.fields(tree)] if _is_dataclass(tree) else []
        for key, value in list(tree.items()):
            yield (f".{key}" if key in names else f"[{key!r}]"), value
    elif isinstance(tree, _SEQUENCES):
        named = getattr(tree, "_fields", None)  # of a named tuple
        for index, value in enumerate(tree):
            yield (f".{named[index]}" if named and index < len(named) else f"[{index}]"), value
    elif isinstance(tree, Set):
        for index, value in enumerate(tree):
            yield f"{{{index}}}", value
    else:
        for name, value in _attributes(tree).items():
            yield f".{name}", value


def _is_dataclass(tree: object) -> TypeGuard[Any]:
    return dataclasses.is_dataclass(tree)


def _is_atom(tree: object) -> bool:
    """Whether an object is not searched."""
    if isinstance(tree, _ATOMS):
        return True
    if isinstance(tree, (Mapping, Set, types.SimpleNamespace, *_SEQUENCES)):
        return False
    return type(tree).__module__.partition(".")[0] in sys.stdlib_module_names


def _attributes(tree: object) -> dict[str, object]:
    """The instance attributes, from ``__dict__`` and from the ``__slots__`` of every base class."""
    attributes: dict[str, object] = {}
    for base in reversed(type(tree).__mro__):
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(tree, name):
                attributes[name] = getattr(tree, name)
    dictionary = getattr(tree, "__dict__", None)
    if isinstance(dictionary, dict):
        attributes.update(dictionary)
    return attributes


class _Mapper:
    """One call of `map_tensors`, which remembers what each tensor and container has become."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.known: dict[int, tuple[object, Any]] = {}

    def map(self, tree: Any, depth: int) -> Any:
        if id(tree) in self.known:
            return self.known[id(tree)][1]
        if isinstance(tree, Tensor):
            return self.remember(tree, self.function(tree))
        if depth >= DEEPEST or _is_atom(tree):
            return tree
        if isinstance(tree, Mapping):
            return self.mapping(tree, depth + 1)
        if isinstance(tree, tuple):
            return self.remember(tree, _tuple_like(tree, [self.map(value, depth + 1) for value in tree]))
        if isinstance(tree, (*_SEQUENCES, Set)):
            return self.collection(tree, depth + 1)
        return self.instance(tree, depth + 1)

    def remember(self, old: object, new: Any) -> Any:
        self.known[id(old)] = (old, new)
        return new

    def mapping(self, old: Mapping[Any, Any], depth: int) -> Any:
        if not isinstance(old, MutableMapping):
            items = {key: self.map(value, depth) for key, value in old.items()}
            constructor: Callable[..., Any] = type(old)
            return self.remember(old, constructor(items))
        plain = type(old) in (dict, OrderedDict)
        new = self.remember(old, type(old)() if plain else copy.copy(old))
        for key, value in list(old.items()):
            new[key] = self.map(value, depth)
        return new

    def collection(self, old: Any, depth: int) -> Any:
        if isinstance(old, MutableSequence):
            new = self.remember(old, copy.copy(old))
            for index, value in enumerate(old):
                new[index] = self.map(value, depth)
            return new
        values = [self.map(value, depth) for value in old]
        if isinstance(old, MutableSet):
            new = copy.copy(old)
            new.clear()
            for value in values:
                new.add(value)
            return self.remember(old, new)
        constructor: Callable[..., Any] = type(old)
        return self.remember(old, constructor(values))

    def instance(self, old: object, depth: int) -> Any:
        attributes = _attributes(old)
        if not attributes:
            return old
        try:
            new = copy.copy(old)
        except Exception:  # noqa: BLE001 - whatever the class raises, the object cannot be copied
            new = old
        if new is old:
            return self.remember(old, old)
        self.remember(old, new)  # before its attributes are mapped, since they may refer to it
        changed = False
        for name, value in attributes.items():
            mapped = self.map(value, depth)
            if mapped is not value:
                object.__setattr__(new, name, mapped)  # frozen dataclasses too
                changed = True
        return new if changed else self.remember(old, old)  # an object without tensors keeps its identity


def _tuple_like(old: tuple[Any, ...], values: list[Any]) -> Any:
    """A tuple of other values, of the class of ``old`` and with its attributes."""
    if type(old) is tuple:
        return tuple(values)
    try:
        new = tuple.__new__(type(old), values)  # not by its constructor, which may take the fields one by one
    except TypeError:
        constructor: Callable[..., Any] = type(old)  # such as torch.return_types.max
        return constructor(values)
    vars_of_old = getattr(old, "__dict__", None)
    if vars_of_old:
        new.__dict__.update(vars_of_old)
    return new
