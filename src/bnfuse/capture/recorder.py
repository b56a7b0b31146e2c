"""Recording operators: a dispatch mode that adds every operator, as it runs, to a list of nodes.

Under ``torch.inference_mode`` a ``TorchDispatchMode`` sees composite operators whole (``aten.conv2d``,
``aten.batch_norm``, ``aten.dropout``), which is the level at which the rules are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from bnfuse.capture import shapes_only as without_arithmetic
from bnfuse.capture.module_calls import ModuleCalls
from bnfuse.capture.values import Values, is_masking
from bnfuse.graph.graph import Node, Storage, Value
from bnfuse.model.sandbox import Mode, SavedState
from bnfuse.operators import Operator, known_as, memory_of, operator_of, parts_of, shape_of
from bnfuse.reasons import IS_CHOSEN, IS_MULTIPLIED_IN, IS_WRITTEN, MEETS_UNSEEN_ARGUMENT, Cause

_SET, _SQUEEZE = torch.ops.aten.set_.default, torch.ops.aten.squeeze.default

_INDEPENDENT = attrgetter("independent")
_IS_INFERENCE = methodcaller("is_inference")

_UNSEEN = attrgetter("unseen")

_INTO_PARTS = frozenset({"unbind", "split", "split_with_sizes", "chunk", "tensor_split"})
"""Operators that give one tensor or more, by the size of what they are given."""

_TO_THE_END = 2**63 - 1
"""The end of a slice that names none."""

_REGROUPING = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
"""Operators that may put axes together."""

_IMAGE = 4
"""So many axes has a batch of images."""

_TO_SHAPES = {"view": "size", "reshape": "shape", "expand": "size", "unflatten": "sizes", "_unsafe_view": "size"}
"""Operators that are told sizes, with the argument."""


def _meet(node: Node) -> None:
    """Pin what meets an argument of which nothing is known; what is made of such alone is as little known."""
    alone = all(value.unseen or value.independent for value in node.inputs)
    for value in node.outputs:
        value.unseen = alone
    for value in (*node.inputs, *(() if alone else node.outputs)):
        if not value.unseen:
            value.pin(MEETS_UNSEEN_ARGUMENT)


def _goes_by_sizes(node: Node, regrouped: bool) -> bool:
    """True if an operator does something else at another size: it adds up an axis, takes a tensor apart, drops all
    axes of size 1, or is told a size or a last place that stands in the code.

    Args:
        regrouped: whether axes of an image may have been put together, else its channels have the same places at all
            sizes.
    """
    if node.operator == "squeeze" and not _drops_fixed(node):
        return True
    if node.operator in _INTO_PARTS or node.operator == "sum":
        return True
    if node.call.is_standard:
        return False
    if node.operator in ("slice", "narrow", "alias"):  # an alias is a slice that leaves nothing out at this size
        names_end = node.operator != "slice" or 0 < (node.argument("end") or 0) < _TO_THE_END
        return names_end and (regrouped or len(node.inputs[0].shape) < _IMAGE)
    sizes = node.argument(_TO_SHAPES.get(node.operator, ""), ())
    return any(size not in (-1, 0, 1) for size in sizes)


def _drops_fixed(node: Node) -> bool:
    """True if a squeeze drops the axes that it is told, none of which is the first, as after pooling to one place."""
    dims = node.argument("dim")
    if node.overload is _SQUEEZE or dims is None or not node.inputs or not node.outputs:
        return False
    given, made = len(node.inputs[0].shape), len(node.outputs[0].shape)
    dims = [dims] if isinstance(dims, int) else list(dims)
    return given - made == len(dims) and all(dim % given for dim in dims)


_MODES = (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot)
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

_CHOOSING = ("cond", "while_loop")
"""Operators of a higher order that go by contents."""

_STATISTICS = ("running_mean", "running_var")


Watcher = Callable[[Node, Sequence[Tensor]], None]
"""``watcher(node, tensors)``: sees the tensors that an operator made, in the order of the node's outputs, at once."""


class Recorder(Mode):
    """Records the operators of one run.

    Attributes:
        nodes: the operators, in the order of the run.
        looks: True once an operator did something that depends on the sizes of a tensor that depends on the input
            (see `_goes_by_sizes`).
        reads_elements: True once an operator gave the code something that depends on its elements.
    """

    def __init__(
        self,
        values: Values,
        calls: ModuleCalls,
        state: SavedState,
        whole: Container[str] | None,
        shapes_only: bool,
        nodes: list[Node],
        watcher: Watcher | None = None,
    ) -> None:
        """
        Args:
            whole: names of the operators that are recorded as they are, None for all of them; see `Recording`.
            shapes_only: whether tensors that depend on the input are left without contents.
            nodes: is added to.
            watcher: looks at what operators make.
        """
        super().__init__()
        self.nodes = nodes
        self.looks = self.reads_elements = False
        self.tracks_gradients = False
        self._autograd: tuple[Any, Any] | None = None
        self._paused = self._regrouped = False
        self._values = values
        self._value_of = values.of  # bound once, since it is called for every tensor of every operator
        self._calls = calls
        self._state = state
        self._whole = whole
        self._shapes_only = shapes_only
        self._watcher = watcher

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            return self._run_functions(func, args, kwargs or {})
        if not torch._C._is_torch_function_mode_enabled():
            return self._run(func, args, kwargs or {})
        with torch._C.DisableTorchFunction():  # sizes that are read here are not read by the model
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and record it."""
        if func is _SET and id(args[0]) not in self._values.leaves:
            self._values.forget(args[0])  # it is given other memory, and nothing is written
            return func(*args, **kwargs)
        operator = operator_of(func)
        bound: dict[str, Any] = dict(zip(operator.arguments, args, strict=False))
        bound.update(kwargs)
        tensors: list[Tensor] = []
        inputs: list[Value] = []
        for name, argument in bound.items():
            if isinstance(argument, Tensor) or (isinstance(argument, (list, tuple)) and not _is_numbers(argument)):
                bound[name] = self._bind(argument, tensors, inputs)
        independent = all(map(_INDEPENDENT, inputs))
        written: list[Value] = []
        if operator.written:
            written = [value for name in operator.written for value in _values(bound.get(name))]
        if operator.writes_if and bound.get(operator.writes_if):
            written += [bound[name] for name in _STATISTICS if isinstance(bound.get(name), Value)]
        if written:
            self._save_before_write(written, pinned=not _masks(operator, bound))
        if self._shapes_only and not independent:
            try:
                result = without_arithmetic.compute(func, operator, args, kwargs, tensors)
            except RuntimeError as error:
                if any(value.independent and value.shape for value in inputs):
                    raise without_arithmetic.FixedSizeError(str(error)) from error
                raise
        elif independent and not self.tracks_gradients and not any(map(_IS_INFERENCE, tensors if written else ())):
            # Somebody may keep it for later, and tensors of inference mode cannot be trained with.
            with torch.inference_mode(False), torch.no_grad():
                result = func(*args, **kwargs)
        else:
            result = self._compute(func, args, kwargs)
        if operator.needs_contents and not independent:
            self.reads_elements = True
        whole = self._whole is None or operator.name in self._whole or written
        if whole or not self._record_parts(func, args, kwargs, result):
            call = self._calls.current
            node = Node(len(self.nodes), known_as(operator, bound), func, bound, inputs, [], call, written)
            self._record(node, operator, tensors, independent, _flat(result))
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing."""
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = outer

    @contextlib.contextmanager
    def below_autograd(self) -> Iterator[None]:
        """See operators before the layer that tracks gradients does, and takes them apart; it then tracks them.

        Inside the transforms of ``torch.func``, which have layers of their own, nothing changes.
        """
        if self._autograd is not None or torch._C._functorch.peek_interpreter_stack() is not None:
            yield
            return
        included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        self._autograd = included, excluded
        try:
            with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
                yield
        finally:
            self._autograd = None

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._autograd is None:
            return func(*args, **kwargs)
        outer, self._autograd = self._autograd, None
        included, excluded = outer
        now = torch._C._dispatch_tls_local_include_set()
        for key in _MODES:
            if not now.has(key):  # there is no other mode
                included = included.remove(key)
        try:
            with torch._C._ForceDispatchKeyGuard(included, excluded):
                return func(*args, **kwargs)
        finally:
            self._autograd = outer

    def pin_all(self, cause: Cause) -> None:
        """Keep the units of everything that was recorded so far."""
        for node in self.nodes:
            for value in (*node.inputs, *node.outputs):
                value.pin(cause)

    def _run_functions(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that is given functions, and record their operators; of a choice, those of both sides."""
        self.looks = True
        result = self.unrolled(func, args, kwargs)
        name = func.name()
        if name not in _CHOOSING:
            return result
        seen = [args, kwargs, result]
        if name == "cond":
            condition, on_true, on_false, operands = args
            with torch._C.DisableTorchFunction():
                other = on_false if condition else on_true
            with contextlib.suppress(Exception), self:
                seen.append(other(*operands))
        self._values.expose(seen, IS_CHOSEN, how=name)
        return result

    def _bind(self, argument: Any, tensors: list[Tensor], inputs: list[Value]) -> Any:
        """An argument with values in place of tensors; both are noted in the lists."""
        if isinstance(argument, Tensor):
            value = self._value_of(argument)
            tensors.append(argument)
            inputs.append(value)
            return value
        if isinstance(argument, (list, tuple)) and any(isinstance(item, Tensor) for item in argument):
            return tuple(self._bind(item, tensors, inputs) for item in argument)
        return argument

    def _save_before_write(self, written: Sequence[Value], pinned: bool) -> None:
        """Save, and mostly pin, parameters and buffers that are about to be written to, or to a view of them."""
        for storage in {value.storage: None for value in written}:
            for leaf in storage.values:
                if leaf.tensor is not None:
                    if pinned:
                        leaf.pin(IS_WRITTEN)
                    self._state.save_contents(leaf.tensor)

    def _record(
        self, node: Node, operator: Operator, tensors: list[Tensor], independent: bool, results: list[Tensor]
    ) -> None:
        """Add an operator that read the tensors and made the results, unless it did nothing."""
        given, written, values = set(map(id, tensors)), node.written, self._values
        made: list[Tensor] = []
        if results and not written and given.issuperset(map(id, results)):
            return  # dropout in evaluation, contiguous of a contiguous tensor
        for tensor in tensors if written else ():
            value = values.known(tensor)
            if value in written and value is not None and value.version == value.storage.version:
                node.outputs.append(values.add_version(tensor, value, node, independent))
                made.append(tensor)
        for tensor in results:
            if id(tensor) in given:
                continue
            storage = None if operator.fresh else self._storage_of(tensor, tensors)
            node.outputs.append(values.add_result(tensor, storage or Storage(), node, independent))
            made.append(tensor)
        for value in node.inputs:
            if not value.consumers or value.consumers[-1] is not node:
                value.consumers.append(node)
        if not independent and not self.looks:
            self._regrouped |= node.operator in _REGROUPING and any(len(v.shape) >= _IMAGE for v in node.outputs)
            self.looks = _goes_by_sizes(node, self._regrouped)
        if not independent and any(map(_UNSEEN, node.inputs)):
            _meet(node)
        self.nodes.append(node)
        node.call.nodes.append(node)
        if self._watcher is not None:
            self._watcher(node, made)

    def _storage_of(self, tensor: Tensor, tensors: list[Tensor]) -> Storage | None:
        """The storage of the last of the tensors whose memory a result shares, None for memory of its own."""
        memory = memory_of(tensor)
        same = [] if memory is None else [other for other in tensors if memory_of(other) == memory]
        return self._value_of(same[-1]).storage if same else None

    def _record_parts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Record an operator as those that it is made of; False if these are not known or give something else.

        The model goes on with what the operator itself made, which is given the values of what its parts made.
        """
        parts = parts_of(func)
        results = _flat(result)
        if parts is None or not results:
            return False
        own = self._calls.current.nodes
        recorded, recorded_own = len(self.nodes), len(own)
        with torch._C.DisableTorchFunction(), self:
            made = _flat(parts(*args, **kwargs))
        values = [self._values.known(tensor) for tensor in made]
        fits = len(results) == len(values) and all(
            value is not None and value.shape == shape_of(tensor) and value.dtype == tensor.dtype
            for tensor, value in zip(results, values, strict=True)
        )
        if not fits:
            for node in self.nodes[recorded:]:
                for value in node.inputs:
                    value.consumers = [other for other in value.consumers if other is not node]
            del self.nodes[recorded:], own[recorded_own:]
            return False
        for tensor, part in zip(results, values, strict=True):
            if part is not None and self._values.known(tensor) is not part:
                self._values.tag(tensor, part)
        return True


def _masks(operator: Operator, bound: dict[str, Any]) -> bool:
    """True if the operator multiplies a parameter by a mask in place; the mask is pinned then."""
    if operator.name != "mul" or operator.written != ("self",) or not isinstance(bound["other"], Value):
        return False
    masks = is_masking(bound["self"], bound["other"])
    if masks:
        bound["other"].pin(IS_MULTIPLIED_IN)
    return masks


def _values(argument: Any) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    return [value for item in argument for value in _values(item)] if isinstance(argument, tuple) else []


def _is_numbers(items: Sequence[Any]) -> bool:
    """True for a size or a stride, which holds nothing but whole numbers."""
    return not items or type(items[0]) is int


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in _flat(item)]
    return []
