"""What one run of a model did, as data: values (tensors), nodes (operators) and the module calls that ran them."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.reasons import Cause, Reason


class Kind(Enum):
    """Where a value comes from."""

    INPUT = "input"
    PARAMETER = "parameter"  # a parameter or persistent buffer, which an edit may rewrite
    ABSENT = "absent"  # a bias or gain that a layer was made without and that can be created
    LAYER = "layer"  # a layer with a handler of the caller's, which changes it
    CONSTANT = "constant"  # any other tensor that was there before the run
    COMPUTED = "computed"


@dataclass(eq=False, slots=True)
class Storage:
    """Memory that several values may share; the version counts the writes to it."""

    version: int = 0
    values: list[Value] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Value:
    """One version of one tensor: a write to its memory makes a new one.

    Attributes:
        names: every name of a parameter or buffer (a tied one has several), else empty.
        pinned: why its units cannot change, None if they can.
        independent: True if it does not depend on the model's inputs.
        unseen: True for what stands for an argument that was never given, or is made of such alone.
        strides: of the tensor in memory, in elements, None for one that has none.
        handler: for a layer with a handler of the caller's, that function, which folds units into the layer.
        tensor: the tensor itself for parameters and constants, never written to.
    """

    index: int
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: Storage
    version: int = 0
    producer: Node | None = None
    consumers: list[Node] = field(default_factory=list)
    names: tuple[str, ...] = ()
    pinned: Reason | None = None
    independent: bool = False
    unseen: bool = False
    strides: tuple[int, ...] | None = None
    tensor: Tensor | None = None
    handler: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A tensor that is copied or pickled during the run takes no value along, let alone the graph behind it."""
        return type(None), ()

    def pin(self, cause: Cause, **fields: Any) -> None:
        """Keep this value's units as they are. The first reason stands.

        Args:
            fields: of the text of the cause.
        """
        if self.pinned is None:
            self.pinned = cause.reason(**fields)

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(eq=False, slots=True)
class Node:
    """One operator that ran.

    Attributes:
        operator: the name without namespace, overload and in-place underscore for ATen (``conv2d``), else in full.
        overload: the operator itself.
        bound: arguments by their schema names, tensors replaced by values; defaults are left out.
        inputs, outputs: the values read and made. An in-place operator makes a new version of what it writes to.
        written: the inputs that it writes to.
        absent: biases and gains that do not exist, or parts of them, that it would read if they were created.
    """

    index: int
    operator: str
    overload: Any
    bound: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    call: ModuleCall
    written: list[Value] = field(default_factory=list)
    absent: tuple[Value, ...] = ()

    def argument(self, name: str, default: Any = None) -> Any:
        return self.bound.get(name, default)

    @property
    def numbers(self) -> list[Any]:
        """The arguments that are no tensors: numbers, flags, texts, and lists of these."""
        found = (_without_tensors(argument) for argument in self.bound.values())
        return [argument for argument in found if argument is not None]

    @property
    def data(self) -> Value | None:
        """The input that depends on the model's inputs, None if there is not exactly one."""
        depending = [value for value in dict.fromkeys(self.inputs) if not value.independent]
        return depending[0] if len(depending) == 1 else None

    @property
    def place(self) -> tuple[str, str, int]:
        """The operator, the module that ran it and the number of the step, as a reason names them."""
        return self.operator, self.call.label, self.index

    def __str__(self) -> str:
        return f"{self.operator} in {self.call.label}"


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of one module: its inputs and outputs, the operators that it ran itself, the modules that it called.

    Attributes:
        path: the module's first name in the model, None for a module that the model does not hold.
        plain: True if it was given one positional argument and nothing else.
        arguments: the positional and keyword arguments of a call that is not plain. Tensors without contents (on the
            meta device) stand in place of all but a few whole numbers.
    """

    path: str | None
    module: nn.Module
    parent: ModuleCall | None
    nodes: list[Node] = field(default_factory=list)
    children: list[ModuleCall] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    plain: bool = False
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def all_nodes(self) -> list[Node]:
        """The operators that it ran, those of the modules that it called included, in the order of the run."""
        nodes = [*self.nodes, *(node for child in self.children for node in child.all_nodes)]
        return sorted(nodes, key=lambda node: node.index)

    @property
    def root(self) -> ModuleCall:
        """The outermost call, one for each call of the model."""
        call = self
        while call.parent is not None:
            call = call.parent
        return call

    @property
    def is_standard(self) -> bool:
        """True if the module runs the forward of a class of PyTorch's."""
        if isinstance(self.module, torch.jit.ScriptModule):
            return False
        kind: Any = type(self.module)
        own = "forward" in self.module.__dict__ and not is_as_in_its_class(self.module, "forward")
        return not own and _runs_as_pytorch_does(kind)

    @property
    def label(self) -> str:
        """A name for messages."""
        kind = type(self.module).__name__
        return f"{self.path} ({kind})" if self.path else kind


def _without_tensors(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_without_tensors(item) for item in argument]
    return None if isinstance(argument, Value) else argument


def is_as_in_its_class(module: nn.Module, name: str) -> bool:
    """True if an attribute of a module is its method of that name, which changes nothing.

    accelerate leaves such a ``forward`` behind where it has removed its hooks.

    >>> layer = nn.ReLU()
    >>> layer.forward = layer.forward
    >>> is_as_in_its_class(layer, "forward"), is_as_in_its_class(layer, "training")
    (True, False)
    """
    value = module.__dict__.get(name)
    if type(value) is not types.MethodType or value.__self__ is not module:
        return False
    return value.__func__ is getattr(type(module), name, None)


@functools.cache
def _runs_as_pytorch_does(kind: type[nn.Module]) -> bool:
    """True if the forward is PyTorch's, and so is every method that PyTorch's classes have for it to call."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]
    if not (kind.forward.__module__ or "").startswith("torch.nn.modules."):
        return False
    theirs = [
        base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.") and base is not nn.Module
    ]
    called = {name for base in theirs for name, value in vars(base).items() if callable(value)} - _NOT_CALLED
    return not any(name in called for base in own for name in vars(base))


_NOT_CALLED = frozenset(
    {
        "__init__",
        "extra_repr",
        "reset_parameters",
        "reset_running_stats",
        "__setstate__",
        "__repr__",
        "_load_from_state_dict",
    }
)
"""Methods that no forward calls."""


@dataclass(eq=False, slots=True)
class Graph:
    """Everything that one run did.

    Attributes:
        leaves: the value of every parameter and buffer that took part, by each of its names.
        exposed: what something outside of these operators saw, by the index of the value: a hook, code outside of
            PyTorch, whoever reads what the model returned or stored.
        paths: operators that did not run, and that would take a created bias apart for the operators of a layer.
    """

    nodes: list[Node]
    calls: list[ModuleCall]
    leaves: dict[str, Value]
    exposed: list[int] = field(default_factory=list)
    paths: list[Node] = field(default_factory=list)

    def release(self) -> None:
        """Break all circles of references, so that memory is freed at once. The graph is of no use afterwards."""
        for node in (*self.paths, *self.nodes):
            for value in node.outputs:
                value.producer, value.consumers, value.storage.values = None, [], []
            node.inputs, node.outputs, node.absent, node.bound = [], [], (), {}
        for value in self.leaves.values():
            value.storage.values = []
        for call in self.calls:
            if call.parent is not None:
                call.parent.children = []
            call.nodes, call.inputs, call.outputs = [], [], []


def may_overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """False only if no two elements share memory.

    Args:
        shape: of a tensor.
        strides: of the same tensor, in elements. No memory is shared where each axis steps over all that the axes of
            smaller strides span.
    """
    span = 0
    for step, size in sorted((step, size) for step, size in zip(strides, shape, strict=True) if size > 1):
        if step <= span:
            return True
        span += step * (size - 1)
    return False
