"""Which value each tensor holds during the run.

A tensor that the run computes carries its value as an attribute. So the record keeps no activation alive, and never
takes one tensor for another that was given the same ``id``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.capture.leaves import Leaves, new_value
from bnfuse.graph.graph import Kind, Node, Storage, Value
from bnfuse.model import pytree
from bnfuse.operators import memory_of
from bnfuse.reasons import Cause

_TAG = "_bnfuse_value"


class Values:
    """The values of all tensors of one run, or of several that follow one another.

    Attributes:
        leaves: those that were there before the run, by the ``id`` of their tensor.
        names: those of parameters and buffers, by each of their names.
        exposed: what was seen outside of the recorded operators, by the index of the value.
        escaped: True once contents that depend on the input have left PyTorch, and may come back.
        in_literal: True while PyTorch makes a tensor of numbers that stand in the code.
    """

    def __init__(
        self,
        leaves: Leaves,
        indices: Iterator[int],
        exposed: list[int],
        held_before: Callable[[Tensor], bool],
        gradients: bool = False,
    ) -> None:
        """
        Args:
            leaves: the tensors that were there before the run.
            indices: gives each new value its number.
            exposed: is added to.
            held_before: whether the model held a tensor before the run.
            gradients: whether gradients are tracked, so that a tensor does not tell whether the run has made it.
        """
        self._gradients = gradients
        self.escaped = False
        self._indices = indices
        self._leaves = leaves
        self._tagged = _TaggedTensors()
        self._remember_tagged = self._tagged.references.append
        self._held_before = held_before
        self.leaves, self.names = leaves.by_identity, leaves.by_name
        self.exposed = exposed
        self.in_literal = False

    # Looking a value up -----------------------------------------------------------------------------------------

    def known(self, tensor: Tensor) -> Value | None:
        """The last value that is known of a tensor, None if there is none."""
        value = tensor.__dict__.get(_TAG)
        return value if value is not None else self.leaves.get(id(tensor))

    def of(self, tensor: Tensor) -> Value:
        """The value that a tensor holds now."""
        value = tensor.__dict__.get(_TAG) or self.leaves.get(id(tensor))
        if value is not None and value.version == value.storage.version:
            return value
        with torch._C.DisableTorchFunction():  # sizes that are read here are not read by the model
            return self._unrecorded(tensor) if value is None else self._rewritten(tensor, value)

    def inside(self, structure: Any) -> list[Value]:
        """The values of all tensors in nested data."""
        if isinstance(structure, Tensor):
            return [self.of(structure)]
        if type(structure) is tuple and len(structure) == 1 and isinstance(structure[0], Tensor):
            return [self.of(structure[0])]  # what most modules are called with
        return [self.of(tensor) for _, tensor in pytree.tensors(structure)]

    def _unrecorded(self, tensor: Tensor) -> Value:
        """The value of a tensor that no recorded operator has made."""
        other = self._tagged.last_in_memory_of(tensor)
        if other is not None:
            same_memory = self.known(other)
            assert same_memory is not None
            value = self._in_memory_of(tensor, same_memory)
            _pin_all(same_memory.storage, reasons.MEMORY_READ_ANOTHER_WAY)
            return value
        value = self._leaves.add(tensor, Kind.CONSTANT)
        # Other threads are not recorded, and what they make does not tell that it was made during the run.
        by_others = self._gradients or self.escaped or tensor.is_inference() or threading.active_count() > 1
        if by_others and tensor.is_floating_point() and not self.in_literal:
            # Made during the run by something that was not recorded, unless the model keeps it from an earlier run.
            value.independent = self._held_before(tensor)
        return value

    def _rewritten(self, tensor: Tensor, value: Value) -> Value:
        """The value of a tensor whose memory was written to through another tensor."""
        fresh = self._in_memory_of(tensor, value)
        _pin_all(value.storage, reasons.WRITTEN_THROUGH_VIEW)
        return fresh

    def _in_memory_of(self, tensor: Tensor, value: Value) -> Value:
        """A new value for a tensor that has the memory of another one, though no operator gave it that."""
        fresh = new_value(next(self._indices), tensor, Kind.COMPUTED, value.storage)
        fresh.independent = all(other.independent for other in value.storage.values)
        self._replace(tensor, fresh)
        return fresh

    # New values -------------------------------------------------------------------------------------------------

    def add_input(self, tensor: Tensor) -> None:
        """An input of the model."""
        value = new_value(next(self._indices), tensor, Kind.INPUT, Storage())
        value.pin(reasons.IS_INPUT)
        self.tag(tensor, value)

    def add_unrecorded(self, tensor: Tensor) -> None:
        """A tensor that the run has made of what depends on the input, by no operator that is recorded."""
        if self.known(tensor) is None:
            self.tag(tensor, new_value(next(self._indices), tensor, Kind.COMPUTED, Storage()))

    def add_result(self, tensor: Tensor, storage: Storage, producer: Node, independent: bool) -> Value:
        """A tensor that an operator has made."""
        value = new_value(next(self._indices), tensor, Kind.COMPUTED, storage)
        value.producer, value.independent = producer, independent
        tensor.__dict__[_TAG] = value  # as tag() does, without a call for every operator
        self._remember_tagged(weakref.ref(tensor))
        return value

    def add_version(self, tensor: Tensor, value: Value, producer: Node, independent: bool) -> Value:
        """What a tensor holds after an operator has written to it; ``value`` is what it held before."""
        value.storage.version += 1
        fresh = new_value(next(self._indices), tensor, Kind.COMPUTED, value.storage)
        fresh.producer, fresh.independent = producer, independent
        if value.tensor is not None:
            if value.pinned is not None:
                fresh.pin(reasons.IS_WRITTEN)
            self._replace(value.tensor, fresh)
        self._replace(tensor, fresh)
        return fresh

    def add_alias(self, tensor: Tensor, other: Tensor) -> bool:
        """Give another tensor, of the same memory and shape, the same value; False if nothing is known of the first."""
        if self.known(tensor) is None:
            return False
        self.tag(other, self.of(tensor))
        return True

    def tag(self, tensor: Tensor, value: Value) -> None:
        tensor.__dict__[_TAG] = value
        self._remember_tagged(weakref.ref(tensor))

    def _replace(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) in self.leaves:
            value.tensor = tensor
            self.leaves[id(tensor)] = value
        else:
            tensor.__dict__[_TAG] = value

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor for one that was never seen."""
        tensor.__dict__.pop(_TAG, None)

    def alive(self) -> list[Tensor]:
        """The tensors of the run that somebody still holds."""
        held = [tensor for reference in self._tagged.references if (tensor := reference()) is not None]
        return list({id(tensor): tensor for tensor in held}.values())

    def remove_tags(self) -> None:
        """Take the attribute, and all that watches them, off all tensors that are still alive."""
        for tensor in self.alive():
            self.forget(tensor)
        self._tagged.clear()

    def assign(self, tensor: Tensor, value: Value) -> None:
        """A parameter holds the memory of another value from now on."""
        self._replace(tensor, value)

    # What others see --------------------------------------------------------------------------------------------

    def expose(self, structure: Any, cause: Cause, **fields: Any) -> list[Value]:
        """Pin all tensors in nested data, since something outside of the recorded operators sees them."""
        found = [self.of(tensor) for _, tensor in pytree.tensors(structure)]
        for value in found:
            value.pin(cause, **fields)
            self.exposed.append(value.index)
        return found


def is_masking(weight: Value, mask: Value) -> bool:
    """True for a parameter and zeros and ones by which the run multiplies it, as in ``weight.data *= mask``.

    If the parameter has other units before, by a scale alone, it has the same ones afterwards, and at every later run,
    provided that the mask stays as it is.
    """
    versions = weight.storage.values
    if weight.tensor is None or weight.kind is Kind.CONSTANT or mask.tensor is None or mask.storage.version != 0:
        return False
    if mask.storage is weight.storage or any(v.tensor is not weight.tensor or v.pinned is not None for v in versions):
        return False
    return bool(((mask.tensor == 0) | (mask.tensor == 1)).all())


def _pin_all(storage: Storage, cause: Cause) -> None:
    for value in storage.values:
        value.pin(cause)


class _TaggedTensors:
    """The tensors that carry a value, without keeping them alive, and found by their memory when that is asked."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Tensor]] = []
        self._by_memory: dict[int, list[weakref.ref[Tensor]]] = {}
        self._sorted = 0  # so many of the references are in the index

    def clear(self) -> None:
        """Drop all references, since a tensor that has one cannot be exchanged for another."""
        self.references.clear()
        self._by_memory.clear()
        self._sorted = 0

    def last_in_memory_of(self, tensor: Tensor) -> Tensor | None:
        """The last tensor, of those still alive, that has the memory of this one."""
        for reference in self.references[self._sorted :]:
            alive = reference()
            if alive is not None and (memory := memory_of(alive)) is not None:
                self._by_memory.setdefault(memory, []).append(reference)
        self._sorted = len(self.references)
        memory = memory_of(tensor)
        for reference in reversed(self._by_memory.get(memory, ())) if memory is not None else ():
            alive = reference()
            # A tensor may have been given other memory since it was sorted in.
            if alive is not None and alive.__dict__.get(_TAG) is not None and memory_of(alive) == memory:
                return alive
        return None
