"""Tensors that were there before the run: parameters, buffers and constants, known by identity and by memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Storage, Value, may_overlap
from bnfuse.operators import is_dense, memory_of, shape_of
from bnfuse.reasons import Reason

_PLAIN_CLASSES = (Tensor, nn.Parameter, nn.Buffer)


def new_value(index: int, tensor: Tensor, kind: Kind, storage: Storage) -> Value:
    """A value with the shape, dtype and strides of a tensor, at the present version of its memory."""
    value = Value(index, kind, shape_of(tensor), tensor.dtype, storage, storage.version)
    if is_dense(tensor):
        value.strides = tensor.stride()
    elif tensor.is_nested:
        value.pin(reasons.IS_SUBCLASS, kind="a nested tensor")
    storage.values.append(value)
    return value


class Leaves:
    """The values of parameters, buffers and constants.

    Attributes:
        by_identity: by the ``id`` of their tensor, which the value keeps alive.
        by_name: those of parameters and buffers, by each of their names.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Module]], indices: Iterator[int]) -> None:
        """
        Args:
            named: every module of the model under each of its names.
            indices: gives each new value its number.
        """
        self.by_identity: dict[int, Value] = {}
        self.by_name: dict[str, Value] = {}
        self._by_memory: dict[int, list[Value]] = {}
        self._first: dict[int, Value] = {}  # by the id of the tensor, what it holds as a run begins
        self._indices = indices
        for tensor, kind, names in _parameters_and_buffers(named):
            self.add(tensor, kind, names)

    def add(self, tensor: Tensor, kind: Kind, names: tuple[str, ...] = ()) -> Value:
        """The value of one more tensor. Parameters with the same memory are one value; overlapping memory is pinned."""
        memory = memory_of(tensor)
        neighbours = [] if memory is None else self._by_memory.setdefault(memory, [])
        for other in neighbours:
            assert other.tensor is not None
            if kind is other.kind is Kind.PARAMETER and _same_elements(tensor, other.tensor):
                other.names += names
                self.by_identity[id(tensor)] = self._first[id(tensor)] = other
                self.by_name.update(dict.fromkeys(names, other))
                return other
        value = new_value(next(self._indices), tensor, kind, neighbours[0].storage if neighbours else Storage())
        value.independent, value.tensor, value.names = True, tensor, names
        if kind is Kind.CONSTANT:
            value.pin(reasons.IS_CONSTANT)
        if type(tensor) not in _PLAIN_CLASSES:
            value.pin(reasons.IS_SUBCLASS, kind=type(tensor).__name__)
        if _overlaps_itself(tensor):
            value.pin(reasons.ELEMENTS_SHARE_MEMORY)
        for other in neighbours:
            assert other.tensor is not None
            if _overlap(tensor, other.tensor):
                other.pin(reasons.SHARES_MEMORY, other=names[0] if names else "another tensor")
                value.pin(reasons.SHARES_MEMORY, other=other.names[0] if other.names else "another tensor")
        neighbours.append(value)
        self.by_identity[id(tensor)] = self._first[id(tensor)] = value
        for name in names:
            self.by_name[name] = value
        return value

    def pins(self) -> list[tuple[Value, Reason | None]]:
        """Why each value is pinned so far."""
        return [(value, value.pinned) for value in self._first.values()]

    def as_before_a_run(self) -> None:
        """Forget what was written to the tensors, once their contents are put back."""
        for key, value in self._first.items():
            if self.by_identity[key] is not value:
                self.by_identity[key] = value
                value.storage.version = value.version

    def forget_since(self, index: int, node: int) -> None:
        """Forget the constants that were added, and the operators that read any of the tensors, since then.

        Args:
            index: of the first value that is forgotten.
            node: of the first operator.
        """
        for key, value in list(self._first.items()):
            if value.index >= index:
                del self._first[key], self.by_identity[key]
                continue
            _forget_readers(value, node)
            if value.storage.values[-1].index >= index:
                value.storage.values = [other for other in value.storage.values if other.index < index]
        for memory, held in list(self._by_memory.items()):
            if held[-1].index >= index:
                self._by_memory[memory] = [value for value in held if value.index < index]
                if not self._by_memory[memory]:
                    del self._by_memory[memory]


def _forget_readers(value: Value, node: int) -> None:
    """Forget the operators from that one on that read a tensor, or what it holds once it was written to."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        while value.consumers and value.consumers[-1].index >= node:
            value.consumers.pop()
        waiting += [
            made
            for reader in value.consumers
            for made in reader.outputs
            if made.tensor is not None and made is not value
        ]


def _parameters_and_buffers(named: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[Tensor, Kind, tuple[str, ...]]]:
    """Each once, with all of its names, parameters first. A buffer that is not saved is a constant."""
    saved: set[int] = set()
    parameters: dict[int, tuple[Tensor, list[str]]] = {}
    buffers: dict[int, tuple[Tensor, list[str]]] = {}
    for path, module in named:
        prefix = f"{path}." if path else ""
        for place, parameter in module._parameters.items():
            if parameter is not None:
                saved.add(id(parameter))
                parameters.setdefault(id(parameter), (parameter, []))[1].append(prefix + place)
        for place, buffer in module._buffers.items():
            if buffer is not None:
                if place not in module._non_persistent_buffers_set:
                    saved.add(id(buffer))
                buffers.setdefault(id(buffer), (buffer, []))[1].append(prefix + place)
    for key, (tensor, names) in buffers.items():
        parameters.setdefault(key, (tensor, []))[1].extend(names)
    for key, (tensor, names) in parameters.items():
        yield tensor, Kind.PARAMETER if key in saved else Kind.CONSTANT, tuple(names)


def _same_elements(a: Tensor, b: Tensor) -> bool:
    """True if two tensors in one memory are the same view of it."""
    return bool(
        a.dtype == b.dtype
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or not (is_dense(a) and is_dense(b)):
        return False
    (a_start, a_end), (b_start, b_end) = _bytes(a), _bytes(b)
    return a_start < b_end and b_start < a_end


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its memory that the tensor uses, and the one after the last."""
    start = int(tensor.storage_offset())
    last = start + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), int(last + 1) * tensor.element_size()


def _overlaps_itself(tensor: Tensor) -> bool:
    if not is_dense(tensor):
        return True
    return not tensor.is_contiguous() and may_overlap(tensor.shape, tensor.stride())
