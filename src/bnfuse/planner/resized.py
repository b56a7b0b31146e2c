"""Calls with inputs of other sizes and other values, in both directions.

Code that looks at sizes may treat them apart: a batch of one, an odd height, a longer sequence, one more entry of a
list. Code that looks at elements may treat contents apart: a mask that hides nothing, or everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfuse.graph.graph import Node
from bnfuse.model.calls import Call
from bnfuse.operators import is_dense

_SMALL = 64
"""Up to this size the double is tried too."""

_MANY = 12
"""A batch so many times as large is divided by most small numbers."""

_ALIGNMENT = 32
"""Networks halve images up to five times, so a size that divides by 32 is changed by 32."""


@dataclass(frozen=True)
class Resizing:
    """One way in which sizes change.

    Attributes:
        what: in words.
        axes: of every tensor that has them.
        size: the new size, from the axis and the old one.
        group: once one resizing of a group works, and no operator rounds the change away, the others of the group need
            not be tried.
        only: the number of the one tensor whose sizes change, None for all.
        anyway: whether it may work although something of a fixed size has met another size of these axes: a little
            smaller, or along an axis that may be taken apart.
    """

    what: str
    axes: frozenset[int]
    size: Callable[[int, int], int]
    group: str
    only: int | None = None
    anyway: bool = False

    def of(self, call: Call, values: int) -> Call | None:
        """The call with other sizes, None if none changes.

        Args:
            values: tells how the contents change, too.
        """
        places = {id(tensor): place for place, tensor in enumerate(call.tensors)}

        def change(tensor: Tensor) -> Tensor:
            axes = self.axes if self.only in (None, places.get(id(tensor))) else frozenset()
            return _resized(_with_other_values(tensor, values), axes, self.size)

        changed = call.map(change)
        same = all(map(_same_shape, changed.tensors, call.tensors))
        return None if same else changed


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return not is_dense(a) or a.shape == b.shape


def resizings(call: Call, thresholds: Sequence[int] = (), divisors: Sequence[int] = ()) -> list[Resizing]:
    """What is tried, the likeliest first: everything larger, a batch of one, everything smaller, single axes.

    They also double, so that what is odd or even stays so. The batch grows by one. Of several tensors each changes
    alone, too; and where the axes of an image are alike, one of them.

    Args:
        thresholds: numbers that the code compares with; sizes on their other side are tried.
        divisors: numbers by which the code takes sizes apart; where nothing else fits, sizes change by these.
    """
    rank = max((tensor.dim() for tensor in call.tensors), default=0)
    trailing = frozenset(range(2, rank))
    both = trailing | {0}
    batch = frozenset({0})
    small = max((size for tensor in filter(is_dense, call.tensors) for size in tensor.shape[2:]), default=0) <= _SMALL
    found = []
    if trailing:
        found += [
            Resizing("larger", both, _more(1), "larger"),
            Resizing("larger", both, _round_up, "larger"),
            Resizing("larger", trailing, _more(1), "larger"),
            Resizing("larger", trailing, lambda axis, size: 2 * size, "larger"),
        ]
        if small:
            found.append(Resizing("twice as large", trailing, lambda axis, size: 2 * size, "twice"))
            found += [  # numbers in the code where a size was meant may fit one of them
                Resizing("larger", trailing, way, "larger") for way in (_more(2), _more(3), lambda axis, size: 3 * size)
            ]
            found.append(Resizing("larger", both, lambda axis, size: _MANY * size if axis == 0 else size + 1, "larger"))
    found.append(Resizing("a batch of one", batch, lambda axis, size: 1, "batch of one"))
    found.append(Resizing("a larger batch", batch, _more(1), "larger batch"))
    found.append(Resizing("a much larger batch", batch, lambda axis, size: 4 * size, "many"))
    if trailing:
        found += [
            Resizing("smaller", trailing, _round_down, "smaller"),
            Resizing("smaller", trailing, _less, "smaller", anyway=True),
        ]
        found += [Resizing("smaller", trailing, _by(-count), "smaller", anyway=True) for count in (2, 3) if small]
    for number in divisors:
        if trailing:
            found += [Resizing("larger", trailing, _by(way * number), "larger") for way in (1, 2)]
            found += [Resizing("smaller", trailing, _by(-number), "smaller")]
        found.append(Resizing("a larger batch", batch, _by(number), "larger batch"))
    samples = max((tensor.shape[0] for tensor in call.tensors if is_dense(tensor) and tensor.dim() == rank), default=1)
    if trailing and samples > 1:  # as many elements as before, so that they may be taken apart in the same way
        traded = frozenset({0, rank - 1})
        what = "a batch of one, and so much longer"
        found.append(
            Resizing(what, traded, lambda axis, size: size * samples if axis else 1, "batch of one", anyway=True)
        )
    for axis in sorted(trailing)[-2:] if len(trailing) > 1 else ():
        alone = frozenset({axis})
        found += [
            Resizing(f"larger along axis {axis} alone", alone, way, f"longer side {axis} of two")
            for way in (_more(1), _round_up, lambda axis, size: 2 * size)
        ]
    several = len(call.tensors)
    for place in range(1, several) if several <= _SEVERAL else ():
        for axes, name in ((trailing or frozenset({1}), "sizes"), (batch, "batch")):
            for way, group in ((_round_up, "larger"), (_round_down, "smaller"), (_more(1), "larger")):
                what = f"other {name} of tensor {place} alone"
                found.append(Resizing(what, axes, way, f"{group} {name} of tensor {place} alone", only=place))
    for number in thresholds:
        for axes in (trailing, batch, *map(frozenset, ([axis] for axis in range(1, min(rank, 2))))):
            if axes:
                found.append(
                    Resizing(f"sizes beyond {number}", axes, _beyond(number), f"beyond {number}: {sorted(axes)}.")
                )
    for axis in range(1, rank):
        alone = frozenset({axis})
        found += [
            Resizing(f"larger along axis {axis}", alone, _more(1), f"larger {axis}", anyway=axis == 1),
            Resizing(f"larger along axis {axis}", alone, _round_up, f"larger {axis}", anyway=axis == 1),
            Resizing(f"smaller along axis {axis}", alone, _less, f"smaller {axis}", anyway=True),
        ]
    return found


_SEVERAL = 4
"""The sizes of so many tensors, at most, change one by one."""

_LARGER = 16
"""At most so many times as large, for the sake of a number in the code."""


def _beyond(number: int) -> Callable[[int, int], int]:
    """A size on the other side of a number, which has the divisors of the present size if it is larger."""

    def size(axis: int, present: int) -> int:
        if present > number:
            return max(1, number - 1)
        wanted = number + 1 if axis == 0 else present * (number // present + 1)
        return wanted if wanted <= max(_LARGER * present, 64) else present

    return size


def _by(count: int) -> Callable[[int, int], int]:
    return lambda axis, size: size + count if size + count > 0 else size


def _less(axis: int, size: int) -> int:
    return max(1, size - 1)


def _more(count: int) -> Callable[[int, int], int]:
    return lambda axis, size: size + (1 if axis == 0 else count)


def _round_up(axis: int, size: int) -> int:
    return size + (1 if axis == 0 else _ALIGNMENT if size % _ALIGNMENT == 0 else size)


def _round_down(axis: int, size: int) -> int:
    return size - _ALIGNMENT if size % _ALIGNMENT == 0 and size > _ALIGNMENT else max(1, size // 2)


def _resized(tensor: Tensor, axes: frozenset[int], size: Callable[[int, int], int]) -> Tensor:
    for axis in axes if is_dense(tensor) else ():
        if axis < tensor.dim() and tensor.shape[axis]:
            wanted = size(axis, tensor.shape[axis])
            while tensor.shape[axis] < wanted:
                more = min(tensor.shape[axis], wanted - tensor.shape[axis])
                tensor = torch.cat([tensor, tensor.narrow(axis, 0, more)], axis)
            tensor = tensor.narrow(axis, 0, wanted)
    return tensor


CONTENTS = 8
"""So many ways to change contents are known."""


def _with_other_values(tensor: Tensor, number: int) -> Tensor:
    """The tensor with other contents: scaled, moved, zeros, large of one sign or both; masks filled, emptied, torn."""
    if not is_dense(tensor) or not tensor.dim() or not tensor.numel() or tensor.is_quantized:
        return tensor
    number %= CONTENTS
    if tensor.dtype == torch.bool or _is_mask(tensor):
        if number == 4 and tensor.is_floating_point():
            return torch.linspace(0.1, 0.9, tensor.numel(), device="cpu").to(tensor).reshape(tensor.shape)
        torn = tensor.roll(1, -1) if number == 2 else tensor.logical_not().to(tensor.dtype)
        return torch.full_like(tensor, not number) if number < 2 else torn
    if tensor.is_floating_point():
        moved = tensor.roll(1, min(1, tensor.dim() - 1))
        large = 100 if tensor.itemsize < 4 else 1000
        above = 1 + moved.abs()
        places = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
        signs = (1 - 2 * ((places + places // max(1, tensor[0].numel())) % 2)).to(tensor.dtype)  # rows are not alike
        ways = (
            lambda: 0.75 * moved,
            lambda: -0.75 * moved,
            lambda: torch.zeros_like(tensor),
            lambda: large * signs * above,
            lambda: 4 + above,
            lambda: -4 - above,
            lambda: large * above,
            lambda: -large * above,
        )
        return ways[number]()
    return tensor.roll(1 + number, -1) if number % 2 else tensor


def _is_mask(tensor: Tensor) -> bool:
    """True for floating ones and zeros."""
    if not tensor.is_floating_point():
        return False
    flat = tensor.reshape(-1)
    return bool(((flat[:8] == 0) | (flat[:8] == 1)).all()) and bool(((flat == 0) | (flat == 1)).all())


def revalued(call: Call, number: int) -> Call:
    """The call with other contents of the same sizes."""
    return call.map(lambda tensor: _with_other_values(tensor, number))


_IN_STEPS = re.compile("(conv|avg_pool|max_pool|im2col)")
"""Operators that take steps along the axes of an image, so that some sizes become the same."""


def rounds_away(nodes: Sequence[Node], others: Sequence[Node]) -> bool:
    """Whether some operator gives the same sizes in both runs though it is given others.

    Args:
        nodes, others: what two runs ran. If it isn't the same operators, the change has been seen.
    """
    if [node.operator for node in nodes] != [node.operator for node in others]:
        return False
    return any(
        _IN_STEPS.match(node.operator)
        and node.inputs[0].shape[2:] != other.inputs[0].shape[2:]
        and node.outputs[0].shape[2:] == other.outputs[0].shape[2:]
        for node, other in zip(nodes, others, strict=True)
    )


def with_other_layouts(call: Call) -> Iterator[Call]:
    """The call with tensors that lie in memory in another way: channels last, or with the last axes swapped."""

    def last(tensor: Tensor) -> Tensor:
        form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
        return tensor.contiguous(memory_format=form) if form is not None and is_dense(tensor) else tensor

    def swapped(tensor: Tensor) -> Tensor:
        dense = is_dense(tensor) and tensor.dim() > 1
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if dense else tensor

    yield call.map(swapped)
    yield call.map(last)


def with_other_lists(call: Call) -> Iterator[tuple[str, Call]]:
    """The call with one entry more, and one fewer, in the lists of tensors among its arguments: at every depth."""
    for depth in range(_DEPTHS):
        for what, change in (("a longer list", _longer), ("a shorter list", _shorter)):
            changed: list[bool] = []
            args = tuple(_map_lists(value, change, depth, changed) for value in call.args)
            kwargs = {name: _map_lists(value, change, depth, changed) for name, value in call.kwargs.items()}
            if changed:
                yield what, call.with_inputs(args, kwargs)


_DEPTHS = 3
"""So many lists inside of one another are looked at."""


def _longer(entries: list[Any]) -> list[Any]:
    return [*entries, entries[-1].clone() if isinstance(entries[-1], Tensor) else entries[-1]]


def _shorter(entries: list[Any]) -> list[Any]:
    return entries[:-1] if len(entries) > 1 else entries


def _map_lists(value: Any, change: Callable[[list[Any]], list[Any]], depth: int, changed: list[bool]) -> Any:
    """The lists at that depth changed; dictionaries count for nothing."""
    if type(value) is dict:
        return {name: _map_lists(item, change, depth, changed) for name, item in value.items()}
    if type(value) not in (list, tuple) or not _holds_tensors(value):
        return value
    if depth:
        return type(value)(_map_lists(item, change, depth - 1, changed) for item in value)
    changed.append(True)
    return type(value)(change(list(value)))


def _holds_tensors(entries: Any) -> bool:
    return bool(entries) and isinstance(entries[-1], (Tensor, list, tuple, dict))


def with_one_input(call: Call) -> Iterator[Call]:
    """The call with one tensor in the place of others of the same shape, where they are different ones."""
    shapes: dict[Any, list[Tensor]] = {}
    for tensor in filter(is_dense, call.tensors):
        held = shapes.setdefault((tensor.shape, tensor.dtype), [])
        if not any(tensor is other for other in held):
            held.append(tensor)
    if any(len(held) > 1 for held in shapes.values()):
        first = {id(tensor): held[0] for held in shapes.values() for tensor in held}
        yield call.map(lambda tensor: first.get(id(tensor), tensor))


def with_separate_inputs(call: Call) -> Call | None:
    """The call with another tensor wherever one is passed a second time; None if none is."""
    seen: dict[int, int] = {}

    def separate(value: Any) -> Any:
        if isinstance(value, Tensor):
            count = seen[id(value)] = seen.get(id(value), -1) + 1
            return value if not count else _with_other_values(value, 1).clone()
        if type(value) in (list, tuple):
            return type(value)(map(separate, value))
        if type(value) is dict:
            return {name: separate(item) for name, item in value.items()}
        return value

    args, kwargs = separate(call.args), separate(call.kwargs)
    return call.with_inputs(args, kwargs) if any(seen.values()) else None
