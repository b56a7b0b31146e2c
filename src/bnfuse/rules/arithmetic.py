r"""Sums of tensors, of which any may be a parameter.

``z = x + k*y`` with ``x_new = s*x + t``, ``y_new = s*y + u`` is ``z_new = s*z + (t + k*u)``: one common scale, and the
shifts add up, so a shift may sit on either operand or go on to the sum. In the inverse direction the same holds with
the inverse scale and shift. A unit that varies along an axis on which an operand is broadcast cannot be that
operand's.
"""

from __future__ import annotations

from torch import Tensor

from bnfuse.graph import Kind, Node, Value
from bnfuse.rules import ABSORBERS, Trial, link, rule
from bnfuse.units import NotInvertibleError, Unit, add


@rule("add", "sub", "rsub")
def add_tensors(node: Node, trial: Trial) -> None:
    z = node.outputs[0]
    x, y = node.bound["self"], node.bound["other"]
    alpha = node.argument("alpha", 1)
    factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[node.operator]
    if not isinstance(x, Value) or not isinstance(y, Value):
        _add_number(node, trial, x if isinstance(x, Value) else y, z)
    elif x is y:
        link(trial, x, z, lambda unit: _times(unit, sum(factors)), lambda unit: _divided(node, trial, unit, factors))
    else:
        _Sum(node, trial, (x, y), factors, z).settle()


def _add_number(node: Node, trial: Trial, x: Value, z: Value) -> None:
    """``z = x + number``: the number cannot be rescaled; a shift passes, with the sign of x."""
    sign = -1.0 if node.operator == "rsub" else 1.0

    def checked(unit: Unit) -> Unit:
        if unit.scale is not None:
            trial.refuse(node, "it adds a number, which cannot be rescaled", scale=True)
        return _times(unit, sign)

    link(trial, x, z, checked, checked)


def _times(unit: Unit, factor: float) -> Unit:
    return Unit(unit.scale, None if unit.shift is None else unit.shift * factor, unit.inverse)


def _divided(node: Node, trial: Trial, unit: Unit, factors: tuple[float, float]) -> Unit:
    if unit.shift is not None and sum(factors) == 0:
        trial.refuse(node, "it subtracts a tensor from itself")
    return Unit(unit.scale, None if unit.shift is None else unit.shift / sum(factors), unit.inverse)


class _Sum:
    """The equation ``z = k0*x0 + k1*x1`` on units, aligned to the shape of z."""

    def __init__(
        self, node: Node, trial: Trial, operands: tuple[Value, Value], factors: tuple[float, float], z: Value
    ) -> None:
        self.node, self.trial, self.z = node, trial, z
        # z - k0*x0 - k1*x1 = 0
        self.terms: list[tuple[Value, float]] = [(z, 1.0), *((x, -k) for x, k in zip(operands, factors, strict=True))]

    def settle(self) -> None:
        known = {value: self._lift(value, unit) for value, _ in self.terms if (unit := self.trial.unit(value))}
        known = self._same_direction(known)
        active = [unit for unit in known.values() if not unit.is_identity]
        if not active:
            return
        scale, inverse = self._common_scale(known), active[0].inverse
        rest = None
        for value, factor in self.terms:
            if value in known:
                shift = known[value].shift
                rest = add(rest, None if shift is None else shift * factor)
        if rest is not None and not bool((rest.abs() > 1e-12 * _magnitude(known)).any()):
            rest = None
        open_terms = [(value, factor) for value, factor in self.terms if value not in known]
        if not open_terms:
            if rest is not None:
                self.trial.refuse(self.node, "the shifts of its operands do not add up")
        elif rest is None:
            for value, _ in open_terms:
                if scale is not None:
                    self._demand(value, Unit(scale, None, inverse))
        elif len(open_terms) == 1:
            value, factor = open_terms[0]
            self._demand(value, Unit(scale, -rest / factor, inverse))
        else:
            self._offer(open_terms, scale, rest, inverse)

    def _offer(
        self, open_terms: list[tuple[Value, float]], scale: Tensor | None, rest: Tensor, inverse: bool
    ) -> None:
        alternatives = []
        for taker, factor in sorted(open_terms, key=lambda term: self._cost(term[0])):
            units = {}
            for value, _ in open_terms:
                shift = -rest / factor if value is taker else None
                unit = Unit.of(scale, shift, inverse)
                lowered = self._lower(value, unit)
                if lowered is None:
                    if scale is not None and value is not taker:
                        self._demand(value, unit)  # refuses
                    break
                units[value] = lowered
            else:
                alternatives.append(units)
        if not alternatives:
            self.trial.refuse(self.node, "none of its operands has an axis for the shift")
        self.trial.choose(self.node, alternatives)

    def _cost(self, value: Value) -> int:
        """How far a shift is likely to travel from here: parameters and layers that feed only this sum come first."""
        if value.kind in (Kind.PARAMETER, Kind.ABSENT):
            return 0
        if value is self.z:
            return 3
        if len(value.consumers) == 1:
            return 1 if value.producer and value.producer.operator in ABSORBERS else 2
        return 4

    def _lift(self, value: Value, unit: Unit) -> Unit:
        missing = len(self.z.shape) - len(value.shape)
        return unit.map(lambda tensor: tensor.reshape([1] * missing + list(tensor.shape)))

    def _lower(self, value: Value, unit: Unit) -> Unit | None:
        missing = len(self.z.shape) - len(value.shape)
        for axis in unit.axes():
            if axis < missing or value.shape[axis - missing] == 1:
                return None
        return unit.map(lambda tensor: tensor.reshape(tensor.shape[missing:]))

    def _demand(self, value: Value, unit: Unit) -> None:
        lowered = self._lower(value, unit)
        if lowered is None:
            self.trial.refuse(
                self.node, "an operand that is broadcast has no axis for the units", scale=unit.scale is not None
            )
        self.trial.demand(value, lowered)

    def _same_direction(self, known: dict[Value, Unit]) -> dict[Value, Unit]:
        directions = {unit.inverse for unit in known.values() if not unit.is_identity}
        if len(directions) < 2:
            return known
        for inverse in (False, True):
            try:
                return {value: unit.turned(inverse) for value, unit in known.items()}
            except NotInvertibleError:
                continue
        self.trial.refuse(self.node, "it would have to undo a scale of (nearly) 0", scale=True)

    def _common_scale(self, known: dict[Value, Unit]) -> Tensor | None:
        units = list(known.values())
        first = units[0].scale_only()
        for unit in units[1:]:
            try:
                agree = first.same_as(unit.scale_only())
            except NotInvertibleError:
                agree = False
            if not agree:
                self.trial.refuse(self.node, "its operands would get different scales", scale=True)
        return first.scale


def _magnitude(known: dict[Value, Unit]) -> Tensor | float:
    magnitude: Tensor | float = 1e-300
    for unit in known.values():
        if unit.shift is not None:
            magnitude = magnitude + unit.shift.abs()
    return magnitude


@rule("alias", "clone", "contiguous", "detach", "lift_fresh", "to", "_to_copy", "type_as", "dropout")
def pass_all(node: Node, trial: Trial) -> None:
    """Copies, casts between floating types and dropout in evaluation change no values."""
    x, y = node.inputs[0], node.outputs[0]
    if node.operator == "dropout" and node.argument("train"):
        trial.refuse(node, "it drops elements at random", scale=True)
    link(trial, x, y, lambda unit: unit, lambda unit: unit)


