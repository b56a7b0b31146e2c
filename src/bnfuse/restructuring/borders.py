"""Paddings whose border is written to afterwards: with which numbers, and whether anybody sees it before.

Blocks that are trained in branches pad with what zeros become. A norm, or a layer with a bias, shifts what it reads, so

    y = F.pad(norm(x), (1, 1, 1, 1))
    y[:, :, :1], y[:, :, -1:], y[..., :1], y[..., -1:] = border, border, border, border

is the norm of ``x`` padded with zeros if ``border`` is what the norm makes of 0. Then all of it is linear. Here it is
found out which numbers stand in the border in the end, at whatever size of the image: the places that are written to
are tried out on images of several sizes. Whether they are the right numbers is for whoever knows what comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfuse.graph.graph import Graph, Node, Value
from bnfuse.reasons import WRITTEN_THROUGH_VIEW

PADS = frozenset({"pad", "constant_pad_nd"})

_VIEWS = frozenset({"slice", "select", "narrow"})
_WRITES = frozenset({"copy", "fill", "zero"})
_REPEATS = frozenset({"expand", "expand_as", "broadcast_to"})
_LARGER = (0, 1, 3)
"""By so much the images on which it is tried out are larger than that of the run."""


@dataclass(frozen=True, eq=False)
class Border:
    """A padding and what is written to its border.

    Attributes:
        pad: the operator that pads.
        nodes: this and the operators that write.
        by: numbers that are in the border in the end, each a number or one for each channel.
    """

    pad: Node
    nodes: frozenset[Node]
    by: tuple[Value | float, ...]


class Borders:
    """The written borders of a recorded model."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._exposed = frozenset(graph.exposed)
        self._known: dict[Value, Border | None] = {}

    def of(self, value: Value) -> Border | None:
        """What a value is if it is a padding whose border was written to, None for any other."""
        if value.producer is not None or not value.version:
            return None
        if value not in self._known:
            self._known[value] = self._border(value)
        return self._known[value]

    def maker(self, value: Value) -> Node | None:
        """The operator that has made a value, of a border that of the padding."""
        border = self.of(value)
        return value.producer if border is None else border.pad

    def is_seen(self, value: Value) -> bool:
        """Whether something other than operators sees a value, or its memory in a way that is not known."""
        return value.pinned is not None and (self._is_seen_itself(value) or self.of(value) is None)

    def _is_seen_itself(self, value: Value) -> bool:
        """Whether something other than operators sees a value whose memory is written to."""
        if value.pinned is None:
            return False
        return value.pinned.code != WRITTEN_THROUGH_VIEW.code or value.index in self._exposed

    def contents(self, name: str) -> Tensor:
        """A parameter or buffer."""
        tensor = self._graph.leaves[name].tensor
        assert tensor is not None
        return tensor

    def _border(self, last: Value) -> Border | None:
        storage = last.storage
        first, pad = storage.values[0], storage.values[0].producer
        if pad is None or pad.operator not in PADS or first.version or storage.version != last.version:
            return None
        views: dict[Value, _View] = {}
        writes: dict[int, tuple[Node, _View]] = {}
        for value in storage.values:
            if value is last:
                continue
            view = _view(value, first, views)
            if view is None or self._is_seen_itself(value):
                return None
            views[value] = view
            if value.producer is not None and value.producer.written:
                writes[value.version] = value.producer, view
        nodes = {pad, *(value.producer for value in views if value.producer is not None)}
        read_elsewhere = any(reader not in nodes for value in views for reader in value.consumers)
        if read_elsewhere or (last.shape, last.strides, last.dtype) != (first.shape, first.strides, first.dtype):
            return None
        if sorted(writes) != list(range(1, last.version + 1)):
            return None
        by = _in_border(pad, [writes[version] for version in sorted(writes)])
        return None if by is None else Border(pad, frozenset(nodes), by)


@dataclass(frozen=True)
class _View:
    """A part of a tensor.

    Attributes:
        axes: of the tensor that it has, in turn.
        cuts: for each that was made, the axis of the tensor and what of it is left.
    """

    axes: tuple[int, ...]
    cuts: tuple[tuple[int, slice], ...] = ()

    def cut(self, tensor: Tensor, skipped: int) -> Tensor:
        """The part of a tensor without the first axes."""
        for axis, part in self.cuts:
            tensor = tensor[(slice(None),) * (axis - skipped) + (part,)]
        return tensor


def _view(value: Value, first: Value, views: dict[Value, _View]) -> _View | None:
    """Which part of the memory of ``first`` a value is, None if that is not known.

    Args:
        views: the same for the values before it.
    """
    node = value.producer
    if value is first or node is None:  # of the second kind are those that see what was written through others
        whole = (value.shape, value.strides, value.dtype) == (first.shape, first.strides, first.dtype)
        return _View(tuple(range(len(first.shape)))) if whole else None
    if node.operator in _WRITES and len(node.written) == 1:
        return views.get(node.written[0])
    before = views.get(node.bound["self"]) if node.operator in _VIEWS else None
    if before is None or value.dtype != first.dtype:
        return None
    place = int(node.argument("dim", 0)) % len(before.axes)
    axis = before.axes[place]
    if node.operator == "select":
        index = int(node.bound["index"])
        axes = before.axes[:place] + before.axes[place + 1 :]
        return _View(axes, (*before.cuts, (axis, slice(index, index + 1 or None))))
    start, step = node.argument("start"), node.argument("step", 1)
    if node.operator == "narrow":
        if not isinstance(start, int):
            return None
        end = start + node.bound["length"]
        end = None if start < 0 and not end else end
    else:
        end = node.argument("end")
    part = slice(start or 0, end, step)
    if not start and (end is None or end == _TO_THE_END) and step == 1:
        return before
    return _View(before.axes, (*before.cuts, (axis, part)))


_IMAGE = 2
"""The first axis of the image, behind those of the batch and the channels."""

_TO_THE_END = 2**63 - 1


def sides(pad: Sequence[int], axes: int) -> list[tuple[int, int]]:
    """How much is added before and behind each axis.

    >>> sides([1, 2], 3)
    [(0, 0), (0, 0), (1, 2)]
    """
    given = [(pad[place], pad[place + 1]) for place in range(0, len(pad), 2)][::-1]
    return [(0, 0)] * (axes - len(given)) + given


def _in_border(pad: Node, writes: Sequence[tuple[Node, _View]]) -> tuple[Value | float, ...] | None:
    """What is in the border in the end, None if something is written elsewhere, or not the same to a whole channel."""
    if pad.argument("mode", "constant") != "constant":
        return None
    shape = pad.outputs[0].shape
    around = sides(pad.bound["pad"], len(shape))
    if len(shape) <= _IMAGE or any(map(any, around[:_IMAGE])) or any(min(each) < 0 for each in around):
        return None
    if any(axis < _IMAGE for _, view in writes for axis, _ in view.cuts):
        return None
    written: list[Value | float] = [float(pad.argument("value") or 0.0)]
    for node, view in writes:
        number = _number(node, view)
        if number is None:
            return None
        written.append(number)
    left: set[int] = set()
    for more in _LARGER:
        places = torch.zeros([size + more for size in shape[_IMAGE:]], dtype=torch.int16, device="cpu")
        for count, (_, view) in enumerate(writes, 1):
            view.cut(places, _IMAGE)[...] = count
        inner = tuple(slice(a, size - b) for (a, b), size in zip(around[_IMAGE:], places.shape, strict=True))
        if bool(places[inner].any()):
            return None
        places[inner] = -1
        left |= set(places.unique().tolist()) - {-1}
    return tuple(written[place] for place in sorted(left))


def _number(node: Node, view: _View) -> Value | float | None:
    """What an operator writes to a part, None if it is not one number for each channel that can be known."""
    if node.operator == "zero":
        return 0.0
    given: Any = node.bound["src" if node.operator == "copy" else "value"]
    if not isinstance(given, Value):
        return None if isinstance(given, complex) else float(given)
    while given.producer is not None and given.producer.operator in _REPEATS:
        given = given.producer.bound["self"]
    if not given.independent or len(given.shape) > len(view.axes):
        return None
    axes = view.axes[len(view.axes) - len(given.shape) :]
    same = all(size == 1 or axis == 1 for axis, size in zip(axes, given.shape, strict=True))
    return given if same else None
