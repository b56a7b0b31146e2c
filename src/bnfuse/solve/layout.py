"""Whether the code after a norm gets on with the memory layout of what comes before it.

A norm makes a dense tensor. What it reads may be a slice or a transposed view; once the norm is gone, the operators
after it get that. Most do not mind, but ``view`` fails on some layouts, and ``reshape`` and ``flatten`` copy where they
gave a view before, which counts if the result is written to. So where the layouts differ, the operators after the norm
run once more on tensors without contents (device "meta") that have the other layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnfuse.graph.graph import Kind, Node, Storage, Value, may_overlap
from bnfuse.graph.norms import Site

_STRICT = ("view", "view_as", "_unsafe_view", "as_strided")
"""Operators that fail, or give something else, on some layouts."""
_LENIENT = ("reshape", "reshape_as", "flatten", "unflatten", "contiguous")
"""Operators that copy where they cannot give a view."""
_DENSE = ("_pack_padded_sequence",)
"""Operators that make the same dense tensor of every layout, and that do not run without contents."""


class Layouts:
    """The layouts of the values that changed because norms went."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._tensors: dict[Value, Tensor] = {}

    def obstacle(self, sites: Sequence[Site]) -> Node | None:
        """An operator that does not get on with the layout if the norm at the sites goes; None if all do."""
        if not self._tensors and all(site.x.strides == site.y.strides for site in sites):
            return None
        changed = dict(self._tensors)
        for site in sites:
            tensor = changed.get(site.x)
            if tensor is None:
                if site.x.strides == site.y.strides:
                    continue
                tensor = _without_contents(site.x)
            changed[site.y] = tensor
            if may_overlap(tensor.shape, tensor.stride()):
                writer = _writer(site.y.storage)
                if writer is not None:
                    return writer
            if _differs_at_other_sizes(site):
                found = _minds(site.y.storage)
                if found is not None:
                    return found
            found = self._run(site, changed)
            if found is not None:
                return found
        self._tensors = changed
        return None

    def _run(self, site: Site, changed: dict[Value, Tensor]) -> Node | None:
        for node in self._nodes[site.nodes[-1].index + 1 :]:
            if node.operator in _DENSE or not any(value in changed for value in node.inputs):
                continue
            try:
                result = node.overload(**{name: _argument(value, changed) for name, value in node.bound.items()})
            except Exception:  # noqa: BLE001 (a layout that it refuses, or no implementation without contents)
                return node
            given = result if isinstance(result, (tuple, list)) else [result]
            results = [tensor for tensor in given if isinstance(tensor, Tensor)]
            for value, tensor in zip(node.outputs, results, strict=False):
                shared = [x for x in node.inputs if x in changed and x.storage is value.storage]
                still = any(_same_storage(changed[x], tensor) for x in shared)
                if shared and not still and _is_written(value.storage):
                    return node
                if tuple(tensor.stride()) != value.strides:
                    changed[value] = tensor
        return None


def _minds(storage: Storage) -> Node | None:
    """An operator that may mind another layout of a dense tensor. What makes a new tensor makes a dense one."""
    strict = (*_STRICT, *_LENIENT) if _is_written(storage) else _STRICT
    readers = (node for value in storage.values for node in value.consumers)
    return next((node for node in readers if node.operator in strict), None)


def _differs_at_other_sizes(site: Site) -> bool:
    """True if the layouts differ only along axes of size 1, so that the run shows too little."""
    x, y = site.x.strides or (), site.y.strides or ()
    return not any(a != b and size > 1 for a, b, size in zip(x, y, site.x.shape, strict=True))


def _argument(argument: Any, changed: dict[Value, Tensor]) -> Any:
    if isinstance(argument, Value):
        if argument in changed:
            return changed[argument]
        if argument.kind is Kind.ABSENT:
            return torch.empty(argument.shape, dtype=argument.dtype, device="meta")
        return _without_contents(argument)
    if isinstance(argument, (tuple, list)):
        return [_argument(item, changed) for item in argument]
    return argument


def _without_contents(value: Value) -> Tensor:
    if value.strides is None:
        raise ValueError("it has no layout")
    return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _is_written(storage: Storage) -> bool:
    return _writer(storage) is not None


def _writer(storage: Storage) -> Node | None:
    readers = (node for value in storage.values for node in value.consumers)
    return next((node for node in readers if any(value.storage is storage for value in node.written)), None)
