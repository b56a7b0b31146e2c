"""Running a model in evaluation mode without leaving a trace on it, or on the caller's random numbers.

`leave_no_trace` is the one place for that; `run` is the short way for a single call.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from bnfuse.model import tree
from bnfuse.model.other_state import OtherState, plain_copy
from bnfuse.model.pytree import map_tensors, tensors
from bnfuse.operators import is_dense, memory_of, operator_of, shape_of

_MISSING = object()


def run(
    model: nn.Module,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    seed: int = 0,
    mode: AbstractContextManager[object] | None = None,
    traces: bool = True,
    writes: bool = True,
    gradients: bool | None = None,
) -> Any:
    """Run a model once in evaluation mode and leave no trace.

    The model sees a copy of the inputs and random generators set to ``seed``. Afterwards training flags, buffers,
    attributes (caches that the run filled) and random generators are as before.

    Args:
        mode: a context in which the model's forward runs.
        traces: False for a model that is known to leave none by itself, which saves looking for them.
        writes: False for a model that is known to write to none of its parameters and buffers.
        gradients: whether gradients are tracked, as the code of some models needs. None for a model of which that is
            not known: it runs with gradients if it fails without.

    Returns:
        What the model returns. Tensors that live in a buffer are copied before the buffer is put back.

    Raises:
        Exception: whatever the model raises.
    """
    if gradients is None:
        return run_either_way(model, args, kwargs, seed, mode, traces, writes)[0]
    modules = tree.modules(model)
    sandbox: AbstractContextManager[object]
    if traces or gradients:
        sandbox = leave_no_trace(modules, seed, writes, False, gradients)
    else:
        sandbox = _in_evaluation(modules, seed, False)
    with sandbox:
        own = functools.partial(own_input, gradients=gradients)
        own_args, own_kwargs = map_tensors((tuple(args), dict(kwargs)), own)
        with mode or nullcontext():
            output = without_history(model(*own_args, **own_kwargs))
        if traces:
            buffers = {_address(buffer) for buffer in model.buffers()} - {0}
            if any(_address(tensor) in buffers for _, tensor in tensors(output)):
                output = map_tensors(output, torch.clone)
        return output


def run_either_way(
    model: nn.Module,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    seed: int = 0,
    mode: AbstractContextManager[object] | None = None,
    traces: bool = True,
    writes: bool = True,
) -> tuple[Any, bool]:
    """Run a model as `run` does, with gradients if it fails without.

    Returns:
        What the model returns, and whether gradients were tracked.
    """
    args, kwargs = tuple(args), dict(kwargs)
    try:
        return run(model, args, kwargs, seed, mode, traces, writes, gradients=False), False
    except Exception as error:  # noqa: BLE001 (whatever the model raises)
        try:
            return run(model, args, kwargs, seed, mode, traces, writes, gradients=True), True
        except Exception:  # noqa: BLE001 (the first one says what is wrong with the model or its inputs)
            raise error from None


def own_input(tensor: Tensor, gradients: bool) -> Tensor:
    """A copy of an input, for a model that may write to it."""
    if not gradients:
        return tensor.detach().clone()
    with torch.inference_mode(False):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def without_history(output: Any) -> Any:
    """What a model returned, without what PyTorch keeps for gradients."""
    if any(tensor.requires_grad for _, tensor in tensors(output)):
        return map_tensors(output, lambda tensor: tensor.detach() if tensor.requires_grad else tensor)
    return output


@contextlib.contextmanager
def leave_no_trace(
    modules: Sequence[nn.Module],
    seed: int = 0,
    watch_writes: bool = True,
    inference: bool = True,
    gradients: bool = False,
) -> Iterator[SavedState]:
    """Inside, modules run in evaluation mode and without gradients; afterwards all is as before.

    That is training flags, attributes, registries, containers in attributes, the contents of parameters and buffers,
    and the random generators. Compiled functions and modules run eagerly.

    Args:
        modules: all modules of a model, each once.
        seed: of the random generators inside.
        watch_writes: False if the caller itself sees to it that the contents of parameters and buffers are saved
            before they are written to.
        inference: use inference mode. Its tensors cannot be trained with, should somebody keep them.
        gradients: track gradients all the same. Those that parameters hold are put aside.

    Yields:
        What was saved, which also tells what the run has stored.
    """
    with _in_evaluation(modules, seed, inference, gradients):
        state = SavedState(modules)
        try:
            with _SaveBeforeWrites(modules, state) if watch_writes else nullcontext():
                yield state
        except BaseException:
            state.look_again()  # what was found is what earlier calls have stored, and not the one that failed
            raise
        finally:
            state.restore()


@contextlib.contextmanager
def _in_evaluation(modules: Sequence[nn.Module], seed: int, inference: bool, gradients: bool = False) -> Iterator[None]:
    without = torch.inference_mode() if inference else torch.no_grad()
    with (
        _gradients(modules) if gradients else without,
        _evaluation_mode(modules),
        forked_random_state(seed),
        _eager(),
        _deeper_stack(),
        _slow_attention(),
    ):
        yield


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """PyTorch's transformer layers run by their operators, as they do while something watches their functions.

    Their fast path drops what is masked, and so gives something else there.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _gradients(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gradients are tracked inside; those that parameters hold are put aside."""
    held = [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]
    before = [(tensor, tensor.grad) for tensor in held]
    try:
        for tensor in held:
            tensor.grad = None
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient


_DEEPER = 2
"""Hooks and modes add frames to every call of a module, up to as many as the call takes by itself."""

_stack = threading.Lock()
_stacks: list[int] = []  # the limits to go back to, of all threads


@contextlib.contextmanager
def _deeper_stack() -> Iterator[None]:
    """A model that just fits on the stack also does so while it is watched."""
    with _stack:
        _stacks.append(sys.getrecursionlimit() if not _stacks else _stacks[0])
        sys.setrecursionlimit(_DEEPER * _stacks[0])
    try:
        yield
    finally:
        with _stack:
            limit = _stacks.pop()
            if not _stacks:
                sys.setrecursionlimit(limit)


@contextlib.contextmanager
def _evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every module's training flag False, and as it was afterwards. Overridden ``train`` methods are not called."""
    flags = [module.training for module in modules]
    try:
        for module, flag in zip(modules, flags, strict=True):
            if flag:
                module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            if module.training is not flag:
                module.training = flag


@contextlib.contextmanager
def forked_random_state(seed: int = 0) -> Iterator[None]:
    """Seeded random numbers inside, the caller's random states untouched outside."""
    state = random.getstate()
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state() if numpy_random else None
    try:
        with _forked_torch_state(seed):
            random.seed(seed)
            if numpy_random:
                numpy_random.seed(seed)
            yield
    finally:
        random.setstate(state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


@contextlib.contextmanager
def _forked_torch_state(seed: int) -> Iterator[None]:
    if torch.accelerator.is_available():
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
        return
    generator = torch.default_generator  # torch.manual_seed would also note the call stack, for devices to come
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(state)


def _eager() -> AbstractContextManager[object]:
    """Compiled functions and modules run eagerly, so that their operators are seen."""
    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled, and loading it takes seconds
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


class SavedState:
    """The state of a model that a run may change. The contents of tensors are saved just before their first write.

    Attributes:
        contents: tensors that were written to, with their contents from before, by ``id``.
        memory: tensors whose memory was replaced (``tensor.data = other``), with that from before, by ``id``.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.contents: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self._attributes = _Attributes(modules)
        parameters = [value for module in modules for value in module._parameters.values() if value is not None]
        self._requiring = [(parameter, parameter.requires_grad) for parameter in parameters]
        kinds = list(map(type, self._attributes.values))
        mutable = {kind for kind in set(kinds) if issubclass(kind, (dict, list, set))}
        containers = list(itertools.compress(self._attributes.values, map(mutable.__contains__, kinds)))
        self._empty = [container for container in containers if not container]  # most of them, and most stay so
        self._containers = [(container, plain_copy(container)) for container in containers if container]
        self._others = OtherState(modules, self._attributes.names, self._attributes.values)
        self._containers += self._others.containers
        self._held: set[int] | None = None
        self._found: list[tuple[nn.Module, dict[str, Any]]] | None = None
        self._found_containers: list[tuple[Any, Any]] | None = None

    def held(self, tensor: Tensor) -> bool:
        """True if an attribute of a module, or a container in one, held the tensor before the run."""
        if self._held is None:
            held = [copy for _, copy in self._containers if not tree.holds_no_object(copy)]
            copies = (copy.values() if isinstance(copy, dict) else copy for copy in held)
            self._held = set(map(id, itertools.chain(self._attributes.values, *copies)))
        return id(tensor) in self._held

    def save_memory(self, tensor: Tensor) -> None:
        """To be called before ``tensor.data = other``, which writes to no element."""
        self.memory.setdefault(id(tensor), (tensor, tensor.data))

    def save_contents(self, tensor: Tensor) -> None:
        """To be called before the tensor is written to. Memory that it was only given during the run is not saved."""
        _, memory = self.memory.get(id(tensor), (tensor, tensor))
        if id(tensor) not in self.contents and memory_of(memory) == memory_of(tensor):
            self.contents[id(tensor)] = (tensor, tensor.detach().clone())

    def stored(self) -> Iterator[tuple[str, Any]]:
        """What the run, which is over, stored in attributes and in the containers that they hold, with the place."""
        for module, before in self._changed_modules():
            for name, value in module.__dict__.items():
                if before.get(name, _MISSING) is not value:
                    yield f"{type(module).__name__}.{name}", value
        for container, _ in self._changed_containers():
            yield f"a {type(container).__name__} of the model", container
        for iterator in self._others.changed_iterators():
            yield f"a {type(iterator).__name__} of the model", None
        yield from self._others.changed_places()

    def other_tensors(self) -> Iterator[Tensor]:
        """Tensors that are no parameters and buffers: in attributes of modules, and what these refer to."""
        for value in self._attributes.values:
            if isinstance(value, Tensor):
                yield value
        for container, _ in self._containers:
            if not tree.holds_no_object(container):
                held = container.values() if isinstance(container, dict) else container
                yield from (value for value in held if isinstance(value, Tensor))
        yield from self._others.tensors

    def look_again(self) -> None:
        """Forget what was found to be stored, since the run goes on."""
        self._found = self._found_containers = None

    def _changed_modules(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        if self._found is None:
            self._found = list(self._attributes.changed())
        return self._found

    def _changed_containers(self) -> list[tuple[Any, Any]]:
        if self._found_containers is None:
            filled = [(now, ()) for now in self._empty if now] if any(self._empty) else []
            changed = [(now, before) for now, before in self._containers if _differs(now, before)]
            self._found_containers = filled + changed
        return self._found_containers

    def replaced(self) -> Iterator[Tensor]:
        """Tensors (parameters, buffers, entries of dictionaries) that the run replaced by others or removed."""
        for container, copy in self._changed_containers():
            if isinstance(container, dict) and isinstance(copy, dict):
                for name, value in copy.items():
                    if isinstance(value, Tensor) and container.get(name) is not value:
                        yield value

    def restore(self) -> None:
        """Put everything back."""
        for module, before in self._changed_modules():
            module.__dict__.clear()
            module.__dict__.update(before)
        for container, copy in self._changed_containers():
            container.clear()
            container.extend(copy) if isinstance(container, (list, deque)) else container.update(copy)
        self._others.restore()
        for parameter, requires in self._requiring:
            if parameter.requires_grad is not requires:
                parameter.requires_grad_(requires)
        for tensor, memory in self.memory.values():
            if memory_of(tensor) != memory_of(memory):
                tensor.data = memory
        for tensor, contents in self.contents.values():
            if shape_of(tensor) == shape_of(contents):
                tensor.data.copy_(contents)


class _Attributes:
    """The attributes of modules, as one list of names and one of values, which are quick to compare."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.sizes, self.names, self.values = self._now()

    def _now(self) -> tuple[list[int], list[str], list[Any]]:
        held = [module.__dict__ for module in self.modules]
        chain = itertools.chain.from_iterable
        return list(map(len, held)), list(chain(held)), list(chain(map(dict.values, held)))

    def changed(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """The modules whose attributes are no longer the same, with the attributes from before."""
        sizes, names, values = self._now()
        if sizes == self.sizes and all(map(is_, names, self.names)) and all(map(is_, values, self.values)):
            return
        start = 0
        for module, size in zip(self.modules, self.sizes, strict=True):
            own = slice(start, start + size)
            before = dict(zip(self.names[own], self.values[own], strict=True))
            if _differs(module.__dict__, before):
                yield module, before
            start += size


def _differs(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return True
    if isinstance(container, dict):
        if all(map(is_, container, before)):  # names in the same order, which is quick to compare
            return not all(map(is_, container.values(), before.values()))
        return any(before.get(name, _MISSING) is not value for name, value in container.items())
    if isinstance(container, (list, deque)):
        return not all(map(is_, container, before))
    return bool(container != before)


class Mode(TorchDispatchMode):
    """A dispatch mode for use inside `leave_no_trace`, where compiled code runs eagerly.

    Operators of a higher order (``torch.cond``, ``scan``, ``flex_attention``) are given functions. They run as Python
    code, so that a mode sees the operators of these functions; each mode calls `unrolled` for them.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would wrap every call, which takes longer than the call and loads the compiler

    def unrolled(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator of a higher order as the operators that it is made of."""
        kernel = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            raise NotImplementedError(f"{func.name()} has no implementation in Python, so it cannot be watched")
        # They refuse to run under a mode, so each is given names by which it sees none.
        names = {**kernel.__globals__, "_get_current_dispatch_mode": lambda: None}
        watched = types.FunctionType(kernel.__code__, names, None, kernel.__defaults__, kernel.__closure__)
        watched.__kwdefaults__ = kernel.__kwdefaults__
        with self:
            return watched(*args, **kwargs)


class _SaveBeforeWrites(Mode):
    """Saves the contents of parameters and buffers just before an operator writes to them."""

    def __init__(self, modules: Sequence[nn.Module], state: SavedState) -> None:
        super().__init__()
        self.state = state
        held = {
            id(tensor): tensor
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        held.update((id(tensor), tensor) for tensor in state.other_tensors() if is_dense(tensor))
        self.by_memory: dict[int | None, list[Tensor]] = {}
        for tensor in held.values():
            self.by_memory.setdefault(memory_of(tensor), []).append(tensor)
            state.save_memory(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.unrolled(func, args, kwargs)
        operator = operator_of(func)
        if operator.written or operator.writes_if:
            for _, tensor in tensors((args, kwargs)):
                for held in self.by_memory.get(memory_of(tensor), ()):
                    self.state.save_contents(held)
        return func(*args, **kwargs)


def is_writable(tensor: Tensor) -> bool:
    """True if the tensor is dense and no two of its elements share memory, as they do in an expanded one."""
    if not is_dense(tensor) or tensor.is_quantized:
        return False
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _address(tensor: Tensor) -> int:
    """Where a tensor's storage begins; 0 where it has none of its own (sparse and distributed tensors)."""
    try:
        return tensor.untyped_storage().data_ptr() if is_dense(tensor) else 0
    except RuntimeError:
        return 0
