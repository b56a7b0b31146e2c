r"""What no unit of a tensor can be, wherever else the tensor goes: known before anything is propagated.

Most attempts that fail do so for a few tensors: an activation that takes no shift and no negative scale, an output of
the model. Operators that hand every element on carry such a limit along: what a reshape makes has the limits of what
it was made of, and the pieces of a concatenation have those of the whole. A sum carries limits of the scale alone,
since its operands and its result have one scale, and their shifts may cancel; so do an average and a product with a
number.

A norm that stays must undo the scale of its input, so a scale of 0 (a dead channel) is limited by the norms that read a
tensor of the class, as long as they stay.

So tensors are put into classes, one family of classes for limits of the scale and one for limits of the shift, and a
demand that breaks a limit is refused at once. That changes no decision; it saves the way to the tensor in question,
which in a dense block or along a residual stream is long.

More is seen only when a rule runs: that a scale is handed on as it is, that a factor can have none so that the product
has the scale of the other one, that nothing passes, or nothing negative. Rules tell this where it holds whatever units
other values have, so that it says nothing of the norm that was tried, and holds until all norms are decided. It is kept
in classes of their own, which hold the others, too. A trial asks them once it has gone so far that the way to the end
would be long: what refuses nearby is still found there, with its own reason.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import NamedTuple

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.reasons import Reason
from bnfuse.rules.registry import FAMILIES, RULES, Family
from bnfuse.units import SAFE_SCALE, Unit


def fixed(value: Value, why: Reason) -> Reason:
    """The reason of a tensor that must stay as it is."""
    maker = value.producer
    if maker is not None and maker.absent and maker.operator == "add":
        maker = maker.bound["self"].producer  # the sum with a bias that does not exist
    if maker is not None:
        return reasons.OUTPUT_FIXED.reason(*maker.place, why=why)
    what = "an input" if value.kind is Kind.INPUT else "a tensor"
    label = " = ".join(value.names) or f"{what} of shape {'x'.join(map(str, value.shape))}"
    return reasons.TENSOR_FIXED.reason(why=why, tensor=label)


_Kind = str | Node
"""What is limited: by name, or a scale of 0 by the norm that would have to undo it."""

_MOST_READERS = 3
"""So many norms are remembered for a class: one of them may be the one to go."""


class _Limit(NamedTuple):
    """A limit, and the place of the operator that sets it among all operators."""

    reason: Reason
    place: int


class _Classes:
    """Sets of values that have the same limits, by union-find; and pieces, which have those of their whole."""

    def __init__(self) -> None:
        self._parent: dict[Value, Value] = {}
        self._limits: dict[Value, dict[_Kind, _Limit]] = {}
        self._pieces: dict[Value, list[Value]] = {}

    def root(self, value: Value) -> Value:
        root = value
        while root in self._parent:
            root = self._parent[root]
        while value is not root:
            self._parent[value], value = root, self._parent[value]
        return root

    def limits(self, value: Value) -> dict[_Kind, _Limit]:
        return self._limits.get(self.root(value), _NONE)

    def unite(self, a: Value, b: Value) -> None:
        a, b = self.root(a), self.root(b)
        if a is b:
            return
        if len(self._pieces.get(a, ())) < len(self._pieces.get(b, ())):
            a, b = b, a
        self._parent[b] = a
        of_a, of_b = self._limits.get(a, _NONE), self._limits.pop(b, _NONE)
        pieces = self._pieces.pop(b, [])
        if pieces:
            self._spread(pieces, of_a)
            self._pieces.setdefault(a, []).extend(pieces)
        if of_b:
            self.limit(a, of_b)

    def cut(self, whole: Value, pieces: Iterable[Value]) -> None:
        pieces = list(pieces)
        self._pieces.setdefault(self.root(whole), []).extend(pieces)
        self._spread(pieces, self.limits(whole))

    def limit(self, value: Value, limits: dict[_Kind, _Limit]) -> None:
        waiting = [(value, limits)]
        while waiting:
            value, limits = waiting.pop()
            root = self.root(value)
            present = self._limits.setdefault(root, {})
            full = len(present) >= _MOST_READERS and sum(isinstance(kind, Node) for kind in present) >= _MOST_READERS
            new = {
                kind: limit
                for kind, limit in limits.items()
                if kind not in present and not (full and isinstance(kind, Node))
            }
            if new:
                present.update(new)
                waiting += [(piece, new) for piece in self._pieces.get(root, ())]

    def _spread(self, pieces: Iterable[Value], limits: dict[_Kind, _Limit]) -> None:
        if limits:
            for piece in pieces:
                self.limit(piece, limits)


def _multiplies_by_a_number(node: Node) -> bool:
    """True for ``2 * x`` and ``x / 2``, which keep a scale; what 0 makes of a tensor has any scale."""
    number = node.argument("other")
    plain = node.operator in _PRODUCTS and isinstance(number, (int, float)) and len(node.inputs) == 1
    return plain and math.isfinite(number) and number != 0 and node.argument("rounding_mode") is None


_PRODUCTS = ("mul", "multiply", "div", "divide", "true_divide")
_NONE: dict[_Kind, _Limit] = {}
_SCALE, _NEGATIVE, _SHIFT = "scale", "negative", "shift"


class Limits:
    """The limits of every value of a graph."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._scales, self._shifts, self._learned = _Classes(), _Classes(), _Classes()
        for node in nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        name = node.operator
        for value in (*node.inputs, *node.outputs):
            if value.pinned is not None:
                self._limit(value, _SCALE, fixed(value, value.pinned), node)
                self._limit(value, _SHIFT, fixed(value, value.pinned), node)
        x, y = (node.inputs[0] if node.inputs else None), (node.outputs[0] if node.outputs else None)
        if x is None or y is None:
            return
        family = FAMILIES.get(name)
        if family is Family.POSITIVE or (family is Family.REARRANGEMENT and len(node.outputs) == 1):
            self.unite(x, y)
        if family is Family.POSITIVE:
            self._limit(y, _NEGATIVE, reasons.NO_NEGATIVE_SCALE.reason(*node.place), node)
            self._limit(y, _SHIFT, reasons.NO_SHIFT.reason(*node.place), node)
        elif name == "batch_norm":
            self._scales.limit(x, {node: _Limit(reasons.UNDOES_ZERO_SCALE.reason(*node.place), node.index)})
        elif family is Family.AVERAGE or _multiplies_by_a_number(node):
            self._unite_scales(x, y)
        elif family is Family.SUM:
            for value in node.inputs:
                if value.shape == y.shape:
                    self._unite_scales(value, y)
        elif family is Family.CONCATENATION:
            self._cut(y, node.inputs)
        elif family is Family.PARTITION:
            self._cut(x, node.outputs)
        elif family is Family.FIXED or name not in RULES:
            reason = reasons.NOTHING_PASSES.reason(*node.place)
            for value in (*node.inputs, *node.outputs):
                self._limit(value, _SCALE, reason, node)
                self._limit(value, _SHIFT, reason, node)

    def unite(self, x: Value, y: Value) -> None:
        """Two values that have the same units from now on, but for the order of their elements."""
        self._unite_scales(x, y)
        self._shifts.unite(x, y)

    def _unite_scales(self, x: Value, y: Value) -> None:
        self._scales.unite(x, y)
        self._learned.unite(x, y)

    def _cut(self, whole: Value, pieces: Iterable[Value]) -> None:
        pieces = list(pieces)
        self._scales.cut(whole, pieces)
        self._learned.cut(whole, pieces)
        self._shifts.cut(whole, pieces)

    def _limit(self, value: Value, kind: str, reason: Reason, node: Node) -> None:
        for classes in (self._shifts,) if kind == _SHIFT else (self._scales, self._learned):
            classes.limit(value, {kind: _Limit(reason, node.index)})

    def refusal(self, value: Value, unit: Unit, *gone: Container[Node]) -> tuple[Reason, bool] | None:
        """Why the value cannot have the unit, and whether its scale is to blame; None if nothing is known of that.

        Args:
            gone: operators of norms that do not stay.
        """
        if unit.scale is not None:
            limits = self._scales.limits(value)
            if _SCALE in limits:
                return limits[_SCALE].reason, True
            if _NEGATIVE in limits and bool((unit.scale < 0).any()):
                return limits[_NEGATIVE].reason, True
            for kind, limit in limits.items():
                if isinstance(kind, Node) and not any(kind in nodes for nodes in gone):
                    if not unit.inverse and bool((unit.scale.abs() < 1 / SAFE_SCALE).any()):
                        return limit.reason, True
                    break
        if unit.shift is not None:
            limits = self._shifts.limits(value)
            if _SHIFT in limits:
                return limits[_SHIFT].reason, False
        return None

    # What trials have found out ----------------------------------------------------------------------------------

    def tie(self, x: Value, y: Value) -> None:
        """A trial has seen that two values have one scale, in any order of its elements, or 1 over it."""
        self._learned.unite(x, y)

    def are_tied(self, x: Value, y: Value) -> bool:
        """True if `tie` would say nothing new."""
        return self._learned.root(x) is self._learned.root(y)

    def learn(self, value: Value, reason: Reason, node: Node, negative: bool) -> None:
        """A trial has seen that a value can have no scale, or no negative one, because of an operator."""
        self._learned.limit(value, {_NEGATIVE if negative else _SCALE: _Limit(reason, node.index)})

    def bears_scale(self, value: Value) -> bool:
        """False if it is known that the value can have no scale."""
        return _SCALE not in self._learned.limits(value)

    def learned_refusal(self, value: Value, unit: Unit) -> Reason | None:
        """As `refusal`, by what trials have found out, too, and for the scale alone.

        Of several reasons it is the one of the nearest operator, at which a trial would most likely arrive first.
        """
        limits = self._learned.limits(value)
        if unit.scale is None or not limits:
            return None
        broken = [limits[_SCALE]] if _SCALE in limits else []
        if _NEGATIVE in limits and unit.has_negative_scale:
            broken.append(limits[_NEGATIVE])
        here = 0 if value.producer is None else value.producer.index
        return min(broken, key=lambda limit: abs(limit.place - here)).reason if broken else None
