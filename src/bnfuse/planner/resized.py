"""Calls with inputs of other sizes and other values, in both directions.

Code that looks at sizes may treat them apart: a batch of one, an odd height, a longer sequence, one more entry of a
list. Code that looks at elements may treat contents apart: a mask that hides nothing, or everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfuse.model.calls import Call
from bnfuse.operators import is_dense

_SMALL = 64
"""Up to this size the double is tried too."""

_ALIGNMENT = 32
"""Networks halve images up to five times, so a size that divides by 32 is changed by 32."""


@dataclass(frozen=True)
class Resizing:
    """One way in which sizes change.

    Attributes:
        what: in words.
        axes: of every tensor that has them.
        size: the new size, from the axis and the old one.
        group: once one resizing of a group works, the others of the group need not be tried.
    """

    what: str
    axes: frozenset[int]
    size: Callable[[int, int], int]
    group: str

    def of(self, call: Call, values: int) -> Call | None:
        """The call with other sizes, None if none changes.

        Args:
            values: tells how the contents change, too.
        """
        changed = call.map(lambda tensor: _resized(_with_other_values(tensor, values), self.axes, self.size))
        same = all(map(_same_shape, changed.tensors, call.tensors))
        return None if same else changed


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return not is_dense(a) or a.shape == b.shape


def resizings(call: Call) -> list[Resizing]:
    """What is tried, the likeliest first: everything larger, a batch of one, everything smaller, single axes.

    They also double, so that what is odd or even stays so. The batch grows by one.
    """
    rank = max((tensor.dim() for tensor in call.tensors), default=0)
    trailing = frozenset(range(2, rank))
    both = trailing | {0}
    batch = frozenset({0})
    found = []
    if trailing:
        found += [
            Resizing("larger", both, _more(1), "larger"),
            Resizing("larger", both, _round_up, "larger"),
            Resizing("larger", trailing, _more(1), "larger"),
            Resizing("larger", trailing, lambda axis, size: 2 * size, "larger"),
        ]
        if max(size for tensor in call.tensors for size in tensor.shape[2:]) <= _SMALL:
            found.append(Resizing("twice as large", trailing, lambda axis, size: 2 * size, "twice"))
    found.append(Resizing("a batch of one", batch, lambda axis, size: 1, "batch of one"))
    found.append(Resizing("a larger batch", batch, _more(1), "larger batch"))
    found.append(Resizing("a much larger batch", batch, lambda axis, size: 4 * size, "many"))
    if trailing:
        found += [
            Resizing("smaller", trailing, _round_down, "smaller"),
            Resizing("smaller", trailing, _less, "smaller"),
        ]
    for axis in range(1, rank):
        alone = frozenset({axis})
        found += [
            Resizing(f"larger along axis {axis}", alone, _more(1), f"larger {axis}"),
            Resizing(f"larger along axis {axis}", alone, _round_up, f"larger {axis}"),
            Resizing(f"smaller along axis {axis}", alone, _less, f"smaller {axis}"),
        ]
    return found


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


CONTENTS = 6
"""So many ways to change contents are known."""


def _with_other_values(tensor: Tensor, number: int) -> Tensor:
    """The tensor with other contents: scaled, moved, large, nothing but zeros; masks filled, emptied, torn."""
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
        ways = (0.75 * moved, -0.75 * moved, torch.zeros_like(tensor), 100 * moved, 5 + moved.abs(), -moved.abs())
        return ways[number]
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
    """The call with one entry more, and one fewer, in the lists of tensors among its arguments."""
    for what, change in (("a longer list", _longer), ("a shorter list", _shorter)):
        args, kwargs = _map_lists(call.args, change), _map_lists(call.kwargs, change)
        if _lists(call.args) or _lists(call.kwargs):
            yield what, call.with_inputs(args, kwargs)


def _longer(entries: list[Any]) -> list[Any]:
    return [*entries, entries[-1].clone() if isinstance(entries[-1], Tensor) else entries[-1]]


def _shorter(entries: list[Any]) -> list[Any]:
    return entries[:-1] if len(entries) > 1 else entries


def _lists(arguments: Any) -> list[Any]:
    held = arguments.values() if isinstance(arguments, dict) else arguments
    return [value for value in held if type(value) in (list, tuple) and _holds_tensors(value)]


def _map_lists(arguments: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    def changed(value: Any) -> Any:
        fits = type(value) in (list, tuple) and _holds_tensors(value)
        return type(value)(change(list(value))) if fits else value

    if isinstance(arguments, dict):
        return {name: changed(value) for name, value in arguments.items()}
    return tuple(map(changed, arguments))


def _holds_tensors(entries: Any) -> bool:
    return bool(entries) and isinstance(entries[-1], (Tensor, list, tuple, dict))


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
