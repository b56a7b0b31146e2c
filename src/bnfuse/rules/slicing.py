r"""Taking tensors apart and putting them together along one axis: units travel with the elements.

The pieces of ``x`` have the pieces of its units, and a concatenation has the concatenated units. A demand on one
piece leaves the other pieces as they are, unless they were given units too; so it waits until all that is certain is
settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules import indexing as places
from bnfuse.rules.registry import Family, Trial, rule
from bnfuse.units import NotInvertibleError, Unit, shrink


class _Piece(NamedTuple):
    """Elements start, start+step, ... (size of them) of an axis, or those of an index; dropped if the axis is gone."""

    value: Value
    start: int
    size: int
    step: int = 1
    dropped: bool = False
    table: Tensor | None = None

    @property
    def elements(self) -> slice | Tensor:
        stop = self.start + (self.size - 1) * self.step + 1
        return slice(self.start, stop, self.step) if self.table is None else self.table


@dataclass(eq=False, slots=True)
class _JoinedUnit(Unit):
    """The unit of a whole, and where it was joined from which units of pieces: they need no second look there."""

    node: Node | None = None
    parts: Mapping[Value, Unit | None] = field(default_factory=dict)

    def stands(self, node: Node, trial: Trial) -> bool:
        """True if the node joined it, and its pieces have the units that they had then."""
        return node is self.node and all(trial.unit(value) is part for value, part in self.parts.items())


@rule("cat", "concat", "concatenate", family=Family.CONCATENATION)
def concatenate(node: Node, trial: Trial) -> None:
    """Any units, which are joined."""
    whole, values = node.outputs[0], node.bound["tensors"]
    if trial.unit(whole) is None:  # most visits end here: a dense block visits it once for each of its pieces
        units = (trial.unit(value) for value in values)
        if all(part is None or part.is_identity for part in units) or trial.postpone(node):
            return
    axis = node.argument("dim", 0) % len(whole.shape)
    pieces, start = [], 0
    for value in values:
        if value.shape == (0,) and len(whole.shape) != 1:
            continue  # the empty tensor that torch.cat lets pass
        pieces.append(_Piece(value, start, value.shape[axis]))
        start += value.shape[axis]
    _settle(node, trial, whole, pieces, axis)


@rule("stack", family=Family.CONCATENATION)
def stack(node: Node, trial: Trial) -> None:
    """Any units, which are joined along the new axis."""
    whole = node.outputs[0]
    axis = node.argument("dim", 0) % len(whole.shape)
    pieces = [_Piece(value, i, 1, dropped=True) for i, value in enumerate(node.bound["tensors"])]
    _settle(node, trial, whole, pieces, axis)


@rule("chunk", "split", "split_with_sizes", "tensor_split", family=Family.PARTITION)
def split(node: Node, trial: Trial) -> None:
    """Any units, which are cut."""
    whole = node.inputs[0]
    axis = node.argument("dim", 0) % len(whole.shape)
    pieces, start = [], 0
    for value in node.outputs:
        pieces.append(_Piece(value, start, value.shape[axis]))
        start += value.shape[axis]
    _settle(node, trial, whole, pieces, axis)


@rule("unbind", family=Family.PARTITION)
def unbind(node: Node, trial: Trial) -> None:
    """Any units, which are cut."""
    whole = node.inputs[0]
    axis = node.argument("dim", 0) % len(whole.shape)
    pieces = [_Piece(value, i, 1, dropped=True) for i, value in enumerate(node.outputs)]
    _settle(node, trial, whole, pieces, axis)


@rule("select", family=Family.PARTITION)
def select(node: Node, trial: Trial) -> None:
    """Any units; the elements that are not taken keep theirs. The index is a number, not a tensor."""
    if not isinstance(node.argument("index"), int):
        trial.refuse(node, reasons.INDEX_IS_TENSOR)
    _take(node, trial)


@rule("slice", "narrow", family=Family.PARTITION)
def take_slice(node: Node, trial: Trial) -> None:
    """Any units; the elements that are not taken keep theirs. The start is a number, not a tensor."""
    if not isinstance(node.argument("start") or 0, int):
        trial.refuse(node, reasons.START_IS_TENSOR)
    _take(node, trial)


@rule("index_select", "index")
def take_index(node: Node, trial: Trial) -> None:
    """Any units, by one list of numbers along one axis; going back, none of them twice.

    By tensors that depend on the input, by masks and by several indices: units that are uniform along the axes that
    they index.
    """
    several = node.operator == "index" and sum(index is not None for index in node.bound["indices"]) > 1
    taken = None if several else _taken(node, trial)
    if taken is None:
        places.take(node, trial)
        return
    axis, piece = taken
    whole, of_part = node.inputs[0], trial.unit(piece.value)
    assert piece.table is not None
    if of_part is not None and piece.table.unique().numel() != piece.table.numel():
        unit = trial.unit_or_identity(whole)
        if not of_part.same_as(_part(unit, piece, axis)):
            trial.refuse(node, reasons.TAKEN_TWICE)
        return
    _settle(node, trial, whole, [piece], axis, chosen=True)


def _take(node: Node, trial: Trial) -> None:
    taken = _taken(node, trial)
    assert taken is not None
    axis, piece = taken
    _settle(node, trial, node.inputs[0], [piece], axis, chosen=True)


def _taken(node: Node, trial: Trial) -> tuple[int, _Piece] | None:
    """The axis along which an operator takes a piece by numbers in the code, and the piece; None if it does not."""
    whole, part = node.inputs[0], node.outputs[0]
    axis = node.argument("dim", 0) % len(whole.shape)
    size = whole.shape[axis]
    if node.operator == "select":
        index = node.argument("index")
        return (axis, _Piece(part, index % size, 1, dropped=True)) if isinstance(index, int) else None
    if node.operator in ("slice", "narrow"):
        start = node.argument("start") or 0
        if not isinstance(start, int):
            return None
        start = min(max(start + size, 0) if start < 0 else start, size)
        return axis, _Piece(part, start, part.shape[axis], node.argument("step", 1))
    if node.operator == "index_select":
        index = node.bound["index"]
    elif node.operator == "index":
        [(axis, index)] = [(axis, index) for axis, index in enumerate(node.bound["indices"]) if index is not None]
    else:
        return None
    if not index.independent or index.dtype != torch.int64 or len(index.shape) != 1:
        return None
    return axis, _Piece(part, 0, part.shape[axis], table=trial.content(index) % whole.shape[axis])


def _siblings(node: Node, trial: Trial, whole: Value, axis: int) -> list[_Piece]:
    """Pieces that other operators take along the same axis, as ``y[:, 2:]`` beside ``y[:, :2]``."""
    pieces = []
    for other in whole.consumers:
        together = other is not node and other.call.root is node.call.root  # and not in another call of the model
        if together and other.inputs[0] is whole and other.operator in ("select", "slice", "narrow"):
            taken = _taken(other, trial)
            if taken is not None and taken[0] == axis:
                pieces.append(taken[1])
    return pieces


def _settle(node: Node, trial: Trial, whole: Value, pieces: list[_Piece], axis: int, chosen: bool = False) -> None:
    """Tie the whole to its pieces. ``chosen``: by numbers in the code, and pieces may leave something over."""
    unit = trial.unit(whole)
    if unit is not None:
        if isinstance(unit, _JoinedUnit) and unit.stands(node, trial):
            return
        if chosen and axis in unit.axes():
            trial.assume(node)
        for piece, part in zip(pieces, _parts(unit, pieces, axis), strict=True):
            if not (part.is_identity and trial.unit(piece.value) is None):
                trial.demand(piece.value, part)
        return
    units = [(piece, unit) for piece in pieces if (unit := trial.unit(piece.value))]
    if any(not unit.is_identity for _, unit in units) and not trial.postpone(node):
        if chosen:
            units += [
                (piece, unit) for piece in _siblings(node, trial, whole, axis) if (unit := trial.unit(piece.value))
            ]
        made = _joined(units, whole, axis)
        if not chosen:
            made_of = {piece.value: trial.unit(piece.value) for piece in pieces}
            made = _JoinedUnit(made.scale, made.shift, made.inverse, node=node, parts=made_of)
        joined = {whole: made}
        spread = _spread(units, axis) if chosen else None
        if chosen and spread is None:
            trial.assume(node)
        trial.choose(node, [joined] if spread is None else [{whole: spread}, joined])


def _spread(units: list[tuple[_Piece, Unit]], axis: int) -> Unit | None:
    """The unit of a single piece for the whole axis, if it is uniform along it, so that it holds for any piece."""
    (piece, unit), *others = units
    if others or (not piece.dropped and axis in unit.axes()):
        return None
    return unit.map(lambda tensor: tensor.unsqueeze(axis)) if piece.dropped else unit


def _part(unit: Unit, piece: _Piece, axis: int) -> Unit:
    def cut(tensor: Tensor) -> Tensor:
        if tensor.shape[axis] > 1:
            tensor = tensor[(slice(None),) * axis + (piece.elements,)]
        return tensor.squeeze(axis) if piece.dropped else tensor

    cut_unit = unit.map(cut)
    return Unit.of(cut_unit.scale, cut_unit.shift, cut_unit.inverse)


def _changed(tensor: Tensor | None, default: float, axis: int) -> bytes:
    """A byte for each element of an axis: 1 where the scale or shift is another than the default."""
    if tensor is None:
        return b""
    changed = tensor != default
    if tensor.numel() != tensor.shape[axis]:
        changed = changed.movedim(axis, 0).flatten(1).any(1)
    return bytes(changed.reshape(-1).tolist())


def _parts(unit: Unit, pieces: list[_Piece], axis: int) -> Iterator[Unit]:
    """The unit of each piece. Most pieces of a long concatenation keep their units, which one look at all tells."""
    if len(pieces) < 2 or any(piece.dropped or piece.step != 1 or piece.table is not None for piece in pieces):
        for piece in pieces:
            yield _part(unit, piece, axis)
        return
    scaled, shifted = _changed(unit.scale, 1.0, axis), _changed(unit.shift, 0.0, axis)

    def cut(tensor: Tensor | None, changed: bytes, piece: _Piece) -> Tensor | None:
        uniform = len(changed) == 1
        if tensor is None or (changed if uniform else changed[piece.start : piece.start + piece.size]).find(1) < 0:
            return None
        return tensor if uniform else tensor.narrow(axis, piece.start, piece.size)

    for piece in pieces:
        scale, shift = cut(unit.scale, scaled, piece), cut(unit.shift, shifted, piece)
        yield Unit(scale, shift, unit.inverse and not (scale is None and shift is None))


def _joined(units: list[tuple[_Piece, Unit]], whole: Value, axis: int) -> Unit:
    directions = {unit.inverse for _, unit in units if not unit.is_identity}
    inverse = directions.pop()
    if directions:  # both directions: turn all into the one that goes
        try:
            units = [(piece, unit.turned(inverse)) for piece, unit in units]
        except NotInvertibleError:
            inverse = not inverse
            units = [(piece, unit.turned(inverse)) for piece, unit in units]

    def join(parts: list[tuple[_Piece, Tensor | None]], default: float) -> Tensor | None:
        given = [(p, t.unsqueeze(axis) if p.dropped else t) for p, t in parts if t is not None]
        if not given:
            return None
        shape = [max(sizes) for sizes in zip(*(t.shape for _, t in given), strict=True)]
        shape[axis] = whole.shape[axis]
        tensor = torch.full(shape, default, dtype=torch.float64, device="cpu")
        for p, t in given:
            tensor[(slice(None),) * axis + (p.elements,)] = t.expand(
                [size if i != axis else p.size for i, size in enumerate(shape)]
            )
        return shrink(tensor, [axis])

    scale = join([(piece, unit.scale) for piece, unit in units], 1.0)
    shift = join([(piece, unit.shift) for piece, unit in units], 0.0)
    return Unit.of(scale, shift, inverse)
