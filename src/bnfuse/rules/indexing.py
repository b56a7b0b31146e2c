r"""Taking elements from places that a tensor tells, and putting or adding them there, as a graph network does.

Where the places depend on the input, nothing is known of which element comes to lie where. So units pass that are the
same at all places: an operator hands them on along all other axes. Adding up (``y[index] += x``) passes a common scale;
a shift of the result is one of what is added to, since a place may be given any number of elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Trial, link, rule
from bnfuse.rules.selection import share
from bnfuse.units import Unit

_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class _Places:
    """Which axes of a tensor an index replaces by its own.

    Attributes:
        taken: the axes of the tensor.
        given: the axes of the result that stand in their place.
    """

    taken: tuple[int, ...]
    given: tuple[int, ...]


def take(node: Node, trial: Trial) -> None:
    """``index_select`` and ``x[index]``, by one tensor or several, of numbers or of booleans."""
    x, y = node.inputs[0], node.outputs[0]
    places = _places(node, x)

    def forward(unit: Unit) -> Unit:
        return _moved(node, trial, unit, places.taken, places.given)

    def backward(unit: Unit) -> Unit:
        return _moved(node, trial, unit, places.given, places.taken)

    link(trial, x, y, forward, backward)


def _places(node: Node, x: Value) -> _Places:
    if node.operator == "index_select":
        axis = node.bound["dim"] % max(len(x.shape), 1)
        return _Places((axis,), (axis,))
    taken: list[int] = []
    entries: list[int] = []
    rank = axis = 0
    for entry, index in enumerate(node.bound["indices"]):
        if index is None:
            axis += 1
            continue
        many = len(index.shape) if index.dtype in _MASKS else 1
        taken += range(axis, axis + many)
        entries.append(entry)
        axis += many
        rank = max(rank, 1 if index.dtype in _MASKS else len(index.shape))
    together = entries[-1] - entries[0] == len(entries) - 1
    first = taken[0] if together else 0  # indices that stand apart have their axes in front
    return _Places(tuple(taken), tuple(range(first, first + rank)))


def _moved(node: Node, trial: Trial, unit: Unit, source: tuple[int, ...], target: tuple[int, ...]) -> Unit:
    """The unit with the axes of the target, along which it is uniform, in place of those of the source."""
    _check_uniform(node, trial, unit, source)

    def move(tensor: Tensor) -> Tensor:
        for axis in reversed(source):
            tensor = tensor.squeeze(axis)
        for axis in target:
            tensor = tensor.unsqueeze(axis)
        return tensor

    return unit.map(move)


def _check_uniform(node: Node, trial: Trial, unit: Unit, axes: Iterable[int]) -> None:
    if unit.axes() & set(axes):
        trial.refuse_unit(node, unit, reasons.INDEXED_BY_TENSOR)


@rule("gather")
def gather(node: Node, trial: Trial) -> None:
    """Units that are uniform along the axis, and along others that it cuts short."""
    x, y = node.inputs[0], node.outputs[0]

    def checked(unit: Unit) -> Unit:
        return _along_others(node, trial, unit, x, y)

    link(trial, x, y, checked, checked)


def _along_others(node: Node, trial: Trial, unit: Unit, *values: Value) -> Unit:
    """The unit, if it varies along none but axes on which every element keeps its place."""
    dim = node.bound["dim"] % max(len(values[0].shape), 1)
    cut = {axis for axis in unit.axes() if len({value.shape[axis] for value in values}) > 1}
    _check_uniform(node, trial, unit, {dim, *cut})
    return unit


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
def put(node: Node, trial: Trial) -> None:
    """The same units on all operands and on the result; for a maximum the scale not negative.

    Uniform along the axis, and along others that it cuts short. What adds up takes a common scale, and a shift of
    what is added to: a place may be given any number of elements. A number or a constant among the operands must
    stay as it is. Products pass nothing.
    """
    x, y = node.bound["self"], node.outputs[0]
    source = next(node.bound[name] for name in ("src", "source", "value") if name in node.bound)
    how = "sum" if node.operator.endswith("_add") else node.argument("reduce", "put")
    values = [value for value in (y, x, source) if isinstance(value, Value)]
    changed = [unit for value in values if not (unit := trial.unit_or_identity(value)).is_identity]
    if not changed:
        return
    _along_others(node, trial, changed[0], *values)
    if how in ("prod", "multiply"):
        trial.refuse(node, reasons.SCATTERS_PRODUCTS)
    if how in ("sum", "add"):
        _add(node, trial, x, y, source)
        return
    shared = share(node, trial, [x, source])
    if how in ("amax", "amin") and shared is not None and shared.has_negative_scale:
        trial.refuse(node, reasons.MAXIMUM_NEGATIVE_SCALE)


def _add(node: Node, trial: Trial, x: Value, y: Value, source: Value | float) -> None:
    if not isinstance(source, Value):
        trial.refuse(node, reasons.ADDS_A_NUMBER)
    of_source = trial.unit(source)
    if of_source is not None and of_source.shift is not None:
        trial.refuse_shift(node, reasons.ADDED_ANY_NUMBER_OF_TIMES)
    whole = next(unit for value in (y, x, source) if (unit := trial.unit(value)) is not None)
    for value in (y, x):
        trial.demand(value, whole)
    trial.demand(source, whole.scale_only())
