"""What happens in memory when a norm goes: its output becomes its input, so a write to one is a write to the other.

A norm makes a new tensor. Once it is gone, an operator that works in place on what was its output works on its input,
which may still be read, on a residual stream above all; and the other way round. Two tensors may become one unless a
value of one, made before a write to the other, is read after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from bnfuse.graph.graph import Node, Storage, Value
from bnfuse.graph.norms import Site


class Memory:
    """Which storages are one since the norms between them went, and which modules no longer work in place."""

    def __init__(self, forbidden: Collection[nn.Module] = ()) -> None:
        self.forbidden = set(forbidden)
        self.switched: dict[nn.Module, None] = {}
        self._groups: dict[Storage, list[Storage]] = {}

    def conflicts(self, sites: Sequence[Site]) -> list[tuple[Node, Value]]:
        """Writers that would overwrite what is still read, with the value, if the norm at the sites went."""
        found = []
        for ours, theirs in self._merged(sites):
            for first in ours:
                for second in theirs:
                    if first is not second:
                        found += self._overwritten(first, second) + self._overwritten(second, first)
        return found

    def training_conflicts(self, sites: Sequence[Site]) -> list[Node]:
        """Writers that would overwrite what training keeps for its backward pass: inputs that others have read, and
        results of functions whose gradient is made of them."""
        found = []
        for site, (ours, theirs) in zip(sites, self._merged(sites), strict=True):
            if ours is not theirs:
                values = [value for storage in ours for value in storage.values]
                if any(_is_kept_for_training(value, site) for value in values):
                    found += [writer for storage in theirs for writer in self._writers(storage)]
        return found

    def _merged(self, sites: Sequence[Site]) -> Iterator[tuple[list[Storage], list[Storage]]]:
        """What becomes one at each of the sites, one after the other."""
        groups = self._groups if len(sites) == 1 else dict(self._groups)
        for site in sites:
            ours, theirs = _groups_of(groups, site)
            if len(sites) > 1:
                _merge(groups, ours, theirs)
            yield ours, theirs

    def _writers(self, storage: Storage) -> list[Node]:
        return [
            node
            for value in storage.values
            for node in value.consumers
            if value in node.written and node.call.module not in self.switched
        ]

    def _overwritten(self, written: Storage, read: Storage) -> list[tuple[Node, Value]]:
        return [
            (writer, value) for writer in self._writers(written) for value in read.values if _read_across(value, writer)
        ]

    def can_switch(self, writer: Node) -> bool:
        """True if the writer is a module with an ``inplace`` setting, which can be switched off."""
        module = writer.call.module
        return getattr(module, "inplace", None) is True and bool(writer.call.path) and module not in self.forbidden

    def merge(self, sites: Sequence[Site]) -> None:
        """The norm at the sites is gone."""
        for site in sites:
            _merge(self._groups, *_groups_of(self._groups, site))


def _groups_of(groups: Mapping[Storage, list[Storage]], site: Site) -> tuple[list[Storage], list[Storage]]:
    """The memory that is one with that of the input, and with that of the output."""
    ours, theirs = site.x.storage, site.y.storage
    return groups.get(ours) or [ours], groups.get(theirs) or [theirs]


def _merge(groups: dict[Storage, list[Storage]], ours: list[Storage], theirs: list[Storage]) -> None:
    if ours is not theirs:
        both = [*ours, *theirs]
        groups.update((storage, both) for storage in both)


_RESULT_KEPT = {"relu", "sigmoid", "tanh", "softmax", "log_softmax", "exp", "sqrt", "rsqrt", "elu", "selu"}
"""Functions whose gradient autograd works out from their result."""


def _is_kept_for_training(value: Value, site: Site) -> bool:
    by_result = value.producer is not None and value.producer.operator in _RESULT_KEPT
    return by_result or any(node not in site.nodes for node in value.consumers)


def _read_across(value: Value, writer: Node) -> bool:
    """True if the value is there before the write and read after it."""
    made = -1 if value.producer is None else value.producer.index
    if made >= writer.index:
        return False
    return value.pinned is not None or any(node.index > writer.index for node in value.consumers)
