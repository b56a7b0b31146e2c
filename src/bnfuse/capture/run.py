"""Running a model once, for real, and recording every operator that the dispatcher sees.

Under ``torch.inference_mode`` a ``TorchDispatchMode`` sees composite operators whole (``aten.conv2d``,
``aten.batch_norm``, ``aten.dropout``), which is the level at which the rules are written. Intermediate tensors carry
their value as an attribute, so nothing is kept alive and no identity is ever mistaken for another; parameters,
buffers and constants are known by identity. The run leaves no trace on the model: see :mod:`bnfuse.model.sandbox`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

from bnfuse.capture import shapes_only as hollow
from bnfuse.errors import InputError
from bnfuse.graph.graph import Graph, Kind, ModuleCall, Node, Storage, Value, may_overlap
from bnfuse.model import pytree, tree
from bnfuse.model.sandbox import Mode, Watch, eager, evaluation_mode, forked_random_state, untouched
from bnfuse.operators import Operator, memory_of, operator_of, parts_of

_TAG = "_bnfuse_value"

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]

# Ways for a tensor's contents to leave what the dispatcher sees.
_ESCAPES: dict[Any, str] = {
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.__array__: ".__array__()",
    torch.Tensor.__dlpack__: ".__dlpack__()",
    torch.Tensor.__deepcopy__: "copy.deepcopy",
    torch.Tensor.__reduce_ex__: "pickling",
    torch.Tensor.data_ptr: ".data_ptr()",
    torch.Tensor.storage: ".storage()",
    torch.Tensor.new_tensor: ".new_tensor()",
    torch.tensor: "torch.tensor",
    torch.as_tensor: "torch.as_tensor",
    torch.asarray: "torch.asarray",
    torch.utils.dlpack.to_dlpack: "to_dlpack",  # type: ignore[attr-defined]
    torch.Tensor.untyped_storage: ".untyped_storage()",
    _DATA: ".data",
    torch.Tensor.data.__set__: ".data",  # type: ignore[attr-defined]
}

# Ways for the code to learn of a size or an element, on which it may then depend.
LOOKS = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__contains__,
}

_SET, _SQUEEZE = torch.ops.aten.set_.default, torch.ops.aten.squeeze.default

# Ways for numbers in the code to become a tensor.
_LITERALS = (torch.tensor, torch.as_tensor, torch.asarray)

# Of these, what hands a tensor on by operators that are seen; elements of a list of tensors are not.
_HANDING_ON = (torch.as_tensor, torch.asarray)

_WATCHED = frozenset({*_ESCAPES, *LOOKS, *_LITERALS})

_OWN_HOOKS: set[int] = set()
"""The global hooks that the recorder has registered; all others are the caller's."""


@dataclass(frozen=True)
class Capture:
    """The record of a run, and what the run returned.

    Attributes:
        looks: True if the code looked at a size or an element of a tensor that depends on the input.
        stateful: True if the run left something behind in the model that depends on the input, or a number.
        traces: True if it left anything behind in the model.
    """

    graph: Graph
    output: Any
    looks: bool
    stateful: bool
    traces: bool


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Container[str] | None = None,
) -> Capture:
    """Run ``model(*args, **kwargs)`` in evaluation mode and record it.

    The tensors among the arguments are cloned first, since a model may write to its input.

    Args:
        known: names of the operators that are to be recorded whole. Any other is recorded as the operators that it
            is made of, where PyTorch knows them (``hstack`` is ``cat``). None records all of them whole.

    Raises:
        InputError: the model does not run on these inputs.
    """
    try:
        return _run(model, args, kwargs, known, False)
    except _FailedError as failed:
        raise InputError(_does_not_run(model, args, kwargs, failed.error)) from failed.error


def capture_hollow(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Container[str] | None = None
) -> Capture:
    """The same without the arithmetic, and without an output: see :mod:`bnfuse.capture.shapes_only`.

    Raises:
        NeedsContentsError: the model looks at contents.
        Exception: whatever else it raised.
    """
    try:
        return _run(model, args, kwargs, known, True)
    except _FailedError as failed:
        error = failed.error
    try:
        raise error
    finally:
        del error  # of whose traceback this is a part


class _FailedError(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Container[str] | None,
    without_contents: bool,
) -> Capture:
    args, kwargs = pytree.map_tensors((args, kwargs), lambda tensor: tensor.detach().clone())
    named = tree.named_modules(model)
    modules = tree.distinct(named)
    with evaluation_mode(modules), forked_random_state(), untouched(modules) as watch, torch.inference_mode():
        recorder = _Recorder(named, watch, known, without_contents)
        for tensor in (tensor for _, tensor in pytree.tensors((args, kwargs))):
            recorder.enter(tensor)
        escapes = _EscapeWatch(recorder)
        with eager(), recorder.module_calls(escapes), recorder, escapes:
            try:
                output = model(*args, **kwargs)
            except Exception as error:
                recorder.graph().release()
                raise _FailedError(error) from error
        recorder.leave(output)
    output = None if without_contents else output
    return Capture(recorder.graph(), output, recorder.looks, recorder.stateful, recorder.traces)


class _Recorder(Mode):
    def __init__(
        self,
        named: Sequence[tuple[str, nn.Module]],
        watch: Watch,
        whole: Container[str] | None,
        without_contents: bool,
    ) -> None:
        super().__init__()
        self.watch = watch
        self.whole = whole
        self.hollow = without_contents
        self.nodes: list[Node] = []
        self.values = 0
        self.leaves: dict[int, Value] = {}
        self.names: dict[str, Value] = {}
        self.memory: dict[int, list[Value]] = {}
        self.tagged: list[weakref.ref[Tensor]] = []
        self.placed: dict[int, list[weakref.ref[Tensor]]] = {}
        self.number_placed = 0
        self.paths = {id(module): name for name, module in reversed(named)}
        self.call = ModuleCall("", named[0][1], None)
        self.calls: list[ModuleCall] = []
        self.thread = threading.get_ident()
        self.in_literal = False
        self.looks = self.stateful = self.traces = False
        self.seen: list[int] = []
        self._register_leaves(named)

    # Values -----------------------------------------------------------------------------------------------------

    def _new_value(self, tensor: Tensor, kind: Kind, storage: Storage) -> Value:
        value = Value(self.values, kind, tuple(tensor.shape), tensor.dtype, storage, storage.version)
        if tensor.layout == torch.strided:
            value.strides = tensor.stride()
        self.values += 1
        storage.values.append(value)
        return value

    def _register_leaves(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        """Parameters and buffers by identity; equal memory is one value, overlapping memory is pinned."""
        kinds: dict[int, Kind] = {}
        tensors: dict[int, tuple[Tensor, list[str]]] = {}
        buffers: dict[int, tuple[Tensor, list[str]]] = {}
        for path, module in named:
            prefix = f"{path}." if path else ""
            for place, parameter in module._parameters.items():
                if parameter is not None:
                    kinds[id(parameter)] = Kind.PARAMETER
                    tensors.setdefault(id(parameter), (parameter, []))[1].append(prefix + place)
            for place, buffer in module._buffers.items():
                if buffer is not None:
                    if place not in module._non_persistent_buffers_set:
                        kinds[id(buffer)] = Kind.PARAMETER
                    buffers.setdefault(id(buffer), (buffer, []))[1].append(prefix + place)
        for key, (tensor, names) in buffers.items():
            tensors.setdefault(key, (tensor, []))[1].extend(names)
        for key, (tensor, names) in tensors.items():
            self._register_leaf(tensor, kinds.get(key, Kind.CONSTANT), tuple(names))

    def _register_leaf(self, tensor: Tensor, kind: Kind, names: tuple[str, ...] = ()) -> Value:
        memory = memory_of(tensor)
        neighbours = [] if memory is None else self.memory.setdefault(memory, [])
        for other in neighbours:
            assert other.tensor is not None
            if kind is other.kind is Kind.PARAMETER and _same_memory(tensor, other.tensor):
                other.names += names
                self.leaves[id(tensor)] = other
                for name in names:
                    self.names[name] = other
                return other
        value = self._new_value(tensor, kind, neighbours[0].storage if neighbours else Storage())
        value.independent, value.tensor, value.names = True, tensor, names
        if kind is Kind.CONSTANT:
            value.pin("it is a constant that no parameter or saved buffer holds")
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            value.pin(f"{type(tensor).__name__} is a tensor subclass")
        if _overlaps_itself(tensor):
            value.pin("several of its elements share memory")
        for other in neighbours:
            assert other.tensor is not None
            if _overlap(tensor, other.tensor):
                label = names[0] if names else "another tensor"
                other.pin(f"it shares memory with {label}")
                value.pin(f"it shares memory with {other.names[0] if other.names else 'another tensor'}")
        neighbours.append(value)
        self.leaves[id(tensor)] = value
        for name in names:
            self.names[name] = value
        return value

    def enter(self, tensor: Tensor) -> None:
        """A model input."""
        value = self._new_value(tensor, Kind.INPUT, Storage())
        value.pin("it is an input of the model")
        self._tag(tensor, value)

    def leave(self, output: Any) -> None:
        """Pin what the model returned or stored, then take the tags off."""
        self._pin_all(output, "it is an output of the model")
        for where, stored in self.watch.changed():
            found = pytree.tensors(stored)
            self.traces = True
            self.stateful |= not found
            for _, tensor in found:
                value = self.known(tensor)
                if value is not None and not value.independent:
                    value.pin(f"it is stored in {where}")
                    self.seen.append(value.index)
                    self.stateful = True
        for leaf in self.watch.replaced():
            value = self.known(leaf)
            if value is not None:
                value.pin("the run puts another tensor in its place")
                self.stateful = True
        self.stateful |= bool(self.watch.saved or self.watch.assigned)
        self.traces |= self.stateful
        for reference in self.tagged:
            alive = reference()
            if alive is not None:
                alive.__dict__.pop(_TAG, None)

    def _tag(self, tensor: Tensor, value: Value) -> None:
        tensor.__dict__[_TAG] = value
        self.tagged.append(weakref.ref(tensor))

    def _computed(self, tensor: Tensor) -> Value | None:
        """The last value that was computed of those whose memory this is, None if there is none."""
        for reference in self.tagged[self.number_placed :]:
            alive = reference()
            if alive is not None and (memory := memory_of(alive)) is not None:
                self.placed.setdefault(memory, []).append(reference)
        self.number_placed = len(self.tagged)
        memory = memory_of(tensor)
        for reference in reversed(self.placed.get(memory, ())) if memory is not None else ():
            alive = reference()
            if alive is not None and _TAG in alive.__dict__ and memory_of(alive) == memory:
                return self.known(alive)
        return None

    def known(self, tensor: Tensor) -> Value | None:
        value = tensor.__dict__.get(_TAG)
        return value if value is not None else self.leaves.get(id(tensor))

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor holds now."""
        value = tensor.__dict__.get(_TAG) or self.leaves.get(id(tensor))
        if value is not None and value.version == value.storage.version:
            return value
        with torch._C.DisableTorchFunction():  # what the recorder looks at is no look of the code's
            return self._unseen(tensor, value)

    def _unseen(self, tensor: Tensor, value: Value | None) -> Value:
        """That of a tensor which no operator has made, or whose memory was written to through another one."""
        if value is None:
            other = self._computed(tensor)
            if other is not None:
                fresh = self._fresh(tensor, other)
                for shared in other.storage.values:
                    shared.pin("its memory is read in another way")
                return fresh
            # Not made by any operator that was seen, and no parameter or buffer: a constant.
            value = self._register_leaf(tensor, Kind.CONSTANT)
            if tensor.is_inference() and tensor.is_floating_point() and not self.in_literal:
                # Made during the run, by something that was not seen, unless the model keeps it from an earlier run.
                value.independent = self.watch.held(tensor)
            return value
        fresh = self._fresh(tensor, value)
        for shared in value.storage.values:
            shared.pin("its memory is written through another view")
        return fresh

    def _fresh(self, tensor: Tensor, value: Value) -> Value:
        """A new value for a tensor that has the memory of another, and not through an operator."""
        fresh = self._new_value(tensor, Kind.COMPUTED, value.storage)
        fresh.independent = all(other.independent for other in value.storage.values)
        self._retag(tensor, fresh)
        return fresh

    def _retag(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) in self.leaves:
            value.tensor = tensor
            self.leaves[id(tensor)] = value
        else:
            tensor.__dict__[_TAG] = value

    # Operators --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch._C._is_torch_function_mode_enabled():
            return self._recorded(func, args, kwargs or {})
        with torch._C.DisableTorchFunction():  # what the recorder looks at is no look of the code's
            return self._recorded(func, args, kwargs or {})

    def _recorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _SET and id(args[0]) not in self.leaves:
            args[0].__dict__.pop(_TAG, None)  # gives its memory back, and writes to none
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
        written = [value for name in operator.written for value in _values(bound.get(name))]
        if operator.writes_if and bound.get(operator.writes_if):
            written += [bound[name] for name in ("running_mean", "running_var") if isinstance(bound.get(name), Value)]
        if written:
            for storage in {value.storage: None for value in written}:
                for leaf in storage.values:
                    if leaf.tensor is not None:  # a parameter, written to itself or through a view
                        leaf.pin("it is written to during the run")
                        self.watch.before_write(leaf.tensor)
        if self.hollow and not independent:
            try:
                result = hollow.compute(func, operator, args, kwargs)
            except RuntimeError as error:
                if any(value.independent and value.shape for value in inputs):
                    raise hollow.FixedSizeError(str(error)) from error
                raise
        else:
            result = func(*args, **kwargs)
        if self.whole is None or operator.name in self.whole or written or not self._split(func, args, kwargs, result):
            node = Node(len(self.nodes), operator.name, func, bound, inputs, [], self.call, written)
            self._record(node, operator, tensors, independent, _flat(result))
        return result

    def _split(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Record an operator as those that it is made of; False if that is not known.

        The model gets what the operator itself made, and the values of what its parts made.
        """
        parts = parts_of(func)
        results = _flat(result)
        if parts is None or not results:
            return False
        recorded, own = len(self.nodes), len(self.call.nodes)
        with torch._C.DisableTorchFunction(), self:
            made = _flat(parts(*args, **kwargs))
        values = [self.known(tensor) for tensor in made]
        fits = len(results) == len(values) and all(
            value is not None and value.shape == tuple(tensor.shape) and value.dtype == tensor.dtype
            for tensor, value in zip(results, values, strict=True)
        )
        if not fits:
            for node in self.nodes[recorded:]:
                for value in node.inputs:
                    value.consumers = [other for other in value.consumers if other is not node]
            del self.nodes[recorded:], self.call.nodes[own:]
            return False
        for tensor, part in zip(results, values, strict=True):
            if part is not None and self.known(tensor) is not part:
                self._tag(tensor, part)
        return True

    def _bind(self, argument: Any, tensors: list[Tensor], inputs: list[Value]) -> Any:
        if isinstance(argument, Tensor):
            value = self.value(argument)
            tensors.append(argument)
            inputs.append(value)
            return value
        if isinstance(argument, (list, tuple)) and any(isinstance(item, Tensor) for item in argument):
            return tuple(self._bind(item, tensors, inputs) for item in argument)
        return argument

    def _record(
        self, node: Node, operator: Operator, tensors: list[Tensor], independent: bool, results: list[Tensor]
    ) -> None:
        """Add an operator that read the tensors and made the results, unless it did nothing."""
        given, written = set(map(id, tensors)), node.written
        if results and not written and given.issuperset(map(id, results)):
            return  # dropout in evaluation, contiguous of a contiguous tensor
        for tensor in tensors if written else ():
            value = self.known(tensor)
            if value in written and value is not None and value.version == value.storage.version:
                value.storage.version += 1
                fresh = self._new_value(tensor, Kind.COMPUTED, value.storage)
                fresh.producer, fresh.independent = node, independent
                if value.tensor is not None:
                    fresh.pin("it is written to during the run")
                self._retag(tensor, fresh)
                node.outputs.append(fresh)
        for tensor in results:
            if id(tensor) in given:
                continue
            storage = None if operator.fresh else self._storage_of(tensor, tensors)
            fresh = self._new_value(tensor, Kind.COMPUTED, storage or Storage())
            fresh.producer, fresh.independent = node, independent
            self._tag(tensor, fresh)
            node.outputs.append(fresh)
        for value in node.inputs:
            if not value.consumers or value.consumers[-1] is not node:
                value.consumers.append(node)
        if node.overload is _SQUEEZE:
            self.looks |= not independent  # which axes go depends on the sizes
        self.nodes.append(node)
        self.call.nodes.append(node)

    def _storage_of(self, tensor: Tensor, tensors: list[Tensor]) -> Storage | None:
        """That of one of the tensors, if it is the memory of this one too."""
        memory = memory_of(tensor)
        same = [] if memory is None else [other for other in tensors if memory_of(other) == memory]
        return self.value(same[-1]).storage if same else None

    def alias(self, tensor: Tensor, other: Tensor) -> bool:
        """Take another tensor for the same, which has its memory and shape; not for a parameter or buffer."""
        if self.known(tensor) is None or id(tensor) in self.leaves:
            return False
        self._tag(other, self.value(tensor))
        return True

    def escape(self, tensor: Tensor, how: str) -> None:
        value = self.known(tensor)
        if value is not None:
            self.seen.append(value.index)
            if value.dtype.is_floating_point or not value.independent:  # an index has no units that could change
                value.pin(f"its contents leave PyTorch by {how}")
            if self.hollow and not value.independent and how != ".data":
                raise hollow.NeedsContentsError(how)

    # Module calls -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def module_calls(self, escapes: _EscapeWatch) -> Iterator[None]:
        """Record which module call runs each operator, and pin what the caller's own hooks get to see."""
        hooked = _has_global_hooks()

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() != self.thread:
                return
            call = ModuleCall(self.paths.get(id(module)), module, self.call, [], [], self._values_in(args))
            self.call = call
            if hooked or has_own_hooks(module):
                self._pin_all(args, f"a hook on {call.label} reads it")
            elif not module._modules and call.is_standard:
                escapes.pause()  # it looks at sizes to check them, and at no contents

        def after(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            call = self.call
            while call.module is not module and call.parent is not None:
                call = call.parent  # calls that ended in an exception which the model caught
            if call.parent is None:
                return
            self.call = call.parent
            escapes.resume()
            if len(rest) < 2:
                return  # it raised an exception
            kwargs, output = rest
            if hooked or has_own_hooks(module):
                self._pin_all((args, kwargs, output), f"a hook on {call.label} reads it")
            given = args if not kwargs else (*args, *kwargs.values()) if kwargs.keys() == {"input"} else ()
            call.plain = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor)
            if not call.plain and any(place in module._parameters for place in ("weight", "bias")):
                call.arguments = pytree.map_tensors((args, kwargs), _like)
            if kwargs:
                call.inputs += self._values_in(kwargs)
            call.outputs = self._values_in(output)
            self.calls.append(call)
            call.parent.children.append(call)

        handles = [
            module_hooks.register_module_forward_pre_hook(before),
            module_hooks.register_module_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        _OWN_HOOKS.update(handle.id for handle in handles)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
                _OWN_HOOKS.discard(handle.id)
                # RemovableHandle forgets these registries, which would leave every later call on the slow path.
                module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)
                module_hooks._global_forward_hooks_always_called.pop(handle.id, None)

    def _values_in(self, structure: Any) -> list[Value]:
        if isinstance(structure, Tensor):
            return [self.value(structure)]
        return [self.value(tensor) for _, tensor in pytree.tensors(structure)]

    def _pin_all(self, structure: Any, reason: str) -> None:
        for _, tensor in pytree.tensors(structure):
            value = self.value(tensor)
            value.pin(reason)
            self.seen.append(value.index)

    def graph(self) -> Graph:
        return Graph(self.nodes, self.calls, self.names, self.seen)


class _EscapeWatch(TorchFunctionMode):
    """Sees the few ways for a tensor's contents to leave without an operator."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.paused = False

    def pause(self) -> None:
        """See nothing for a while, which makes every call of PyTorch's faster."""
        if _get_current_function_mode() is self:
            _pop_mode()
            self.paused = True

    def resume(self) -> None:
        if self.paused:
            _push_mode(self)
            self.paused = False

    def __exit__(self, *raised: Any) -> None:
        self.resume()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _WATCHED:
            return func(*args, **(kwargs or {}))
        if func in LOOKS and not self.recorder.looks and args and isinstance(args[0], Tensor):
            value = self.recorder.known(args[0])
            by_pytorch = self.recorder.call.is_standard  # which checks sizes, and does not go by them
            self.recorder.looks = not by_pytorch and (value is None or not value.independent)
        how = _ESCAPES.get(func)
        if func == _DATA:
            data = func(*args)
            if self.recorder.alias(args[0], data):
                return data
        given = (args, kwargs) if kwargs else args
        seen = func in _HANDING_ON and isinstance(args[0] if args else (kwargs or {}).get("data"), Tensor)
        if how is not None and not seen:
            for _, tensor in pytree.tensors(given):
                self.recorder.escape(tensor, how)
            if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
                self.recorder.watch.before_assignment(args[0])
        self.recorder.in_literal = func in _LITERALS and not pytree.tensors(given)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.recorder.in_literal = False


_INDEPENDENT = attrgetter("independent")

_FEW = 64


def _like(tensor: Tensor) -> Tensor:
    """A tensor that stands for another one without keeping its contents, unless it is a few whole numbers."""
    if tensor.numel() <= _FEW and not tensor.is_floating_point():
        return tensor.detach().clone()
    return torch.empty_like(tensor, device="meta")


def has_hooks(module: nn.Module) -> bool:
    """True if a hook of the caller's runs around the module's forward.

    PyTorch's own hooks that recompute a weight (weight_norm, spectral_norm, pruning) read no activations.
    """
    return _has_global_hooks() or has_own_hooks(module)


def has_own_hooks(module: nn.Module) -> bool:
    """True if the caller has registered a hook on the module itself."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        return False
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(not type(getattr(hook, "__self__", hook)).__module__.startswith("torch.nn.utils.") for hook in hooks)


def _has_global_hooks() -> bool:
    registries = (module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks)
    return any(not _OWN_HOOKS.issuperset(registry) for registry in registries)


def _values(argument: Any) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    return [value for item in argument for value in _values(item)] if isinstance(argument, tuple) else []


def _is_numbers(items: Sequence[Any]) -> bool:
    """True for a size or a stride, which holds whole numbers alone."""
    return not items or type(items[0]) is int


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in _flat(item)]
    return []


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return bool(
        a.dtype == b.dtype
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last byte of the storage that the tensor uses."""
    start = int(tensor.storage_offset())
    last = start + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), int(last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.is_sparse or b.is_sparse:
        return False
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return True
    return not tensor.is_contiguous() and may_overlap(tensor.shape, tensor.stride())


def _does_not_run(model: nn.Module, args: Any, kwargs: Any, error: Exception) -> str:
    given = ", ".join(
        f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
        for _, tensor in pytree.tensors((args, kwargs))
    )
    first_line = str(error).strip().split("\n")[0]
    return (
        f"{type(model).__name__} does not run on the inputs ({given or 'no tensors'}): "
        f"{type(error).__name__}: {first_line}. Pass inputs that it accepts."
    )
