r"""Products and quotients: gates, gains, LayerScale, numbers.

``z = x*y`` of two tensors that depend on the input: ``x_new = s*x``, ``y_new = r*y`` gives ``z_new = s*r*z``; a shift
on either would leave a mixed term. Where the scales of z and of one factor are both 0, that of the other may be
anything. If one factor ``p`` does not depend on the input, its contents are known, and a shift of the other passes:
with ``x_new = s*x + t`` and ``p_new = r*p``,

    z_new = x_new*p_new = (s*r)*z + t*(r*p),        inverse: z_old = (s/r)*z_new + t*p  for  x_old = s*x_new + t.

A scale may go on to the product or be taken up by ``p``, if that is a parameter or made of one. Division is the same
with ``1/p``. A number is a factor that cannot be edited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.masks import is_written_over, mask_of
from bnfuse.rules.registry import Trial, cost, forbid, lift, link, lower, rule, same
from bnfuse.units import NotInvertibleError, Unit, multiply, reciprocal


@rule("mul", "div", "true_divide", "multiply", "divide")
def product(node: Node, trial: Trial) -> None:
    """Two tensors: scales, whose product is that of the result; no shift, which would leave ``t*y``.

    A divisor takes the inverse. A factor p that does not depend on the input passes any units: the shift is
    multiplied by p, and p may take the scale; going back, no element of p is 0. With a number (not 0, if there is a
    shift) any units pass, and the shift is multiplied by it. With a mask of zeros and ones any units pass where the
    same mask is multiplied by again, or fills the same places.
    """
    x, y, z = node.bound["self"], node.bound["other"], node.outputs[0]
    if isinstance(x, complex) or isinstance(y, complex):
        trial.refuse(node, reasons.IS_COMPLEX)
    power = 1 if node.operator.startswith("mul") else -1
    if node.argument("rounding_mode") is not None:
        trial.refuse_any(node, (*node.inputs, *node.outputs), reasons.ROUNDS)
    if not isinstance(x, Value):
        if power < 0:
            trial.refuse_any(node, (*node.inputs, *node.outputs), reasons.DIVIDES_A_NUMBER)
        x, y = y, x
    if not isinstance(y, Value):
        if power < 0 and y == 0:
            trial.refuse(node, reasons.DIVIDES_BY_ZERO)
        _times_number(node, trial, x, float(y) ** power, z)
    elif x is y:
        trial.refuse_any(node, (x, z), reasons.MULTIPLIES_BY_ITSELF)
    elif power > 0 and (masked := _masked(trial, x, y, z)) is not None:
        link(trial, masked, z, same, same)
    elif y.independent and not x.independent:
        _Gain(node, trial, x, y, z, power).settle()
    elif x.independent and not y.independent and power > 0:
        _Gain(node, trial, y, x, z, power).settle()
    else:
        _gate(node, trial, ((z, 1), (x, -1), (y, -power)))


def _masked(trial: Trial, x: Value, y: Value, z: Value) -> Value | None:
    """The factor that the other one masks, where the zeros that are put in are written over again; else None."""
    for value, other in ((x, y), (y, x)):
        kept = mask_of(other)
        if kept is not None and value.shape == z.shape and is_written_over(z, ~kept, trial):
            return value
    return None


@rule("neg", "negative")
def negate(node: Node, trial: Trial) -> None:
    """Any units; the shift changes its sign."""
    _times_number(node, trial, node.inputs[0], -1.0, node.outputs[0])


@rule("_weight_norm")
def weight_norm(node: Node, trial: Trial) -> None:
    """A scale, to the magnitude g along its axis; no shift, and the direction v stays as it is.

    ``w = g * v/norm(v)`` (Salimans and Kingma, 2016), so a scale of w along the axis of g is a scale of g.
    """
    v, g, w = node.inputs[0], node.inputs[1], node.outputs[0]
    forbid(node, trial, [v], reasons.DIRECTION_IS_FIXED)

    def checked(unit: Unit) -> Unit:
        if unit.shift is not None:
            trial.refuse_shift(node, reasons.NO_SHIFT)
        lowered = lower(unit, g, w)
        if lowered is None:
            trial.refuse(node, reasons.MAGNITUDE_HAS_NO_AXIS)
        return lowered

    link(trial, g, w, checked, checked)


@rule("glu")
def gated_half(node: Node, trial: Trial) -> None:
    """A scale of the half that is not the gate; no shift: ``(s*a)*sigmoid(b)``."""
    x, y = node.inputs[0], node.outputs[0]
    axis = node.argument("dim", -1) % len(x.shape)

    def checked(unit: Unit) -> Unit:
        if unit.shift is not None:
            trial.refuse_shift(node, reasons.GATE_SHIFT)
        return unit

    def forward(unit: Unit) -> Unit:
        scale = checked(unit).scale
        if scale is None:
            return unit
        if scale.shape[axis] == 1 or not bool((scale.narrow(axis, y.shape[axis], y.shape[axis]) == 1).all()):
            trial.refuse(node, reasons.GATING_HALF)
        return Unit.of(scale.narrow(axis, 0, y.shape[axis]), None, unit.inverse)

    def backward(unit: Unit) -> Unit:
        scale = checked(unit).scale
        if scale is None:
            return unit
        shape = list(scale.shape)
        shape[axis] = y.shape[axis]
        return Unit(
            torch.cat([scale.expand(shape), scale.new_ones(shape)], axis),
            None,
            unit.inverse,
        )

    link(trial, x, y, forward, backward)


def _times_number(node: Node, trial: Trial, x: Value, number: float, z: Value) -> None:
    def by(unit: Unit, factor: float) -> Unit:
        if unit.shift is None:
            return unit
        if number == 0:
            trial.refuse_shift(node, reasons.MULTIPLIES_BY_ZERO)
        if number != -1:
            trial.assume(node)
        return Unit(unit.scale, unit.shift * factor, unit.inverse)

    link(trial, x, z, lambda unit: by(unit, number), lambda unit: by(unit, 1 / number if number else 0.0))


class _Gain:
    """``z = x * p**power`` with p independent of the model's inputs."""

    def __init__(self, node: Node, trial: Trial, x: Value, p: Value, z: Value, power: int) -> None:
        self.node, self.trial, self.x, self.p, self.z, self.power = node, trial, x, p, z, power

    def settle(self) -> None:
        trial, x, p, z = self.trial, self.x, self.p, self.z
        if not trial.bears_scale(p):
            trial.tie((x, z))
        of_x, of_p, of_z = trial.unit(x), trial.unit(p), trial.unit(z)
        if of_p is not None:
            if of_p.shift is not None:
                trial.refuse_shift(self.node, reasons.FACTOR_SHIFT)
            ratio = self._ratio_of(of_p)
            if of_x is not None:
                self._demand(z, self._forward(lift(of_x, x, z), ratio))
            elif of_z is not None:
                self._demand(x, self._backward(of_z, ratio))
            elif ratio is not None:
                self._offer([{z: Unit(ratio)}, {x: Unit(reciprocal(ratio))}])
        elif of_x is not None and of_z is not None:
            self._demand(p, self._missing(lift(of_x, x, z), of_z))
        elif of_x is not None and not of_x.is_identity:
            unit = lift(of_x, x, z)
            self._offer([{z: self._forward(unit, None)}, *self._absorbed(unit, into=z)])
        elif of_z is not None and not of_z.is_identity:
            self._offer([*self._absorbed(of_z, into=x), {x: self._backward(of_z, None)}])

    def _absorbed(self, unit: Unit, into: Value) -> list[dict[Value, Unit]]:
        """The scale goes into p; a shift goes on."""
        if unit.scale is None or (self.p.pinned and not self.p.producer):
            return []
        try:
            scale, _ = unit.direct()
        except NotInvertibleError:
            if into is self.z and unit.inverse and unit.shift is None:
                # x_old = s*x_new with a dead channel: p takes s itself.
                return [{self.p: self._factor(unit.scale), self.z: Unit()}]
            return []
        assert scale is not None
        try:
            ratio = reciprocal(scale) if into is self.z else scale
            factor = self._factor(ratio)
            moved = self._forward if into is self.z else self._backward
            rest = Unit.of(None, moved(unit.turned(False), ratio).shift) if unit.shift is not None else Unit()
        except NotInvertibleError:
            return []
        return [{self.p: factor, into: rest}]

    def _factor(self, ratio: Tensor) -> Unit:
        """The unit of p that multiplies ``p**power`` by the ratio."""
        return Unit(ratio if self.power > 0 else reciprocal(ratio))

    def _ratio_of(self, unit: Unit) -> Tensor | None:
        scale, _ = lift(unit, self.p, self.z).direct()
        return scale if scale is None or self.power > 0 else reciprocal(scale)

    def _contents(self) -> Tensor:
        contents = self.trial.content(self.p).double()
        contents = contents.reshape([1] * (len(self.z.shape) - contents.dim()) + list(contents.shape))
        return contents if self.power > 0 else 1 / contents

    def _forward(self, unit: Unit, ratio: Tensor | None) -> Unit:
        if unit.inverse:
            scale = unit.scale if ratio is None else _combined(unit.scale, reciprocal(ratio))
            return Unit(scale, None if unit.shift is None else unit.shift * self._contents(), True)
        shift = None if unit.shift is None else multiply(unit.shift * self._contents(), ratio)
        return Unit(_combined(unit.scale, ratio), shift)

    def _backward(self, unit: Unit, ratio: Tensor | None) -> Unit:
        shift = None
        if unit.shift is not None:
            contents = self._contents()
            shift = unit.shift / contents
            if bool((contents.abs() < 1e-8).any()):
                self.trial.refuse_shift(self.node, reasons.GAIN_IS_ZERO)
        if unit.inverse:
            return Unit(_combined(unit.scale, ratio), shift, True)
        inverse = None if ratio is None else reciprocal(ratio)
        shift = None if shift is None else multiply(shift, inverse)
        return Unit(_combined(unit.scale, inverse), shift)

    def _missing(self, of_x: Unit, of_z: Unit) -> Unit:
        """What p needs so that given units of x and z fit."""
        s, _ = of_x.direct()
        r, _ = of_z.direct()
        ratio = _ratio(r, s)
        if not self._forward(of_x.turned(False), ratio).same_as(of_z.turned(False)):
            self.trial.refuse_shift(self.node, reasons.SHIFTS_DO_NOT_FIT)
        same = ratio is None or bool(((ratio - 1).abs() < 1e-10).all())  # s * (1/s) is not always 1
        return Unit() if ratio is None or same else self._factor(ratio)

    def _demand(self, value: Value, unit: Unit) -> None:
        lowered = lower(Unit.of(unit.scale, unit.shift, unit.inverse), value, self.z)
        if lowered is None:
            self.trial.refuse_unit(self.node, unit, reasons.FACTOR_IS_BROADCAST)
        if not (lowered.is_identity and self.trial.unit(value) is None):
            self.trial.demand(value, lowered)

    def _offer(self, alternatives: list[dict[Value, Unit]]) -> None:
        fitting = []
        for units in alternatives:
            lowered = {value: lower(unit, value, self.z) for value, unit in units.items()}
            kept = {value: unit for value, unit in lowered.items() if unit is not None}
            if len(kept) == len(lowered):
                fitting.append(kept)
        if not fitting:
            self.trial.refuse(self.node, reasons.FACTOR_IS_BROADCAST)
        self.trial.choose(self.node, fitting, scale=True)


def _gate(node: Node, trial: Trial, terms: tuple[tuple[Value, int], ...]) -> None:
    """Scales of tensors whose product, each to its power, is fixed."""
    z = terms[0][0]
    bearing = [value for value, _ in terms if trial.bears_scale(value)]
    if 1 < len(bearing) < len(terms):
        trial.tie(bearing)
    known: dict[Value, Tensor | None] = {}
    for inverse in (False, True):
        try:
            for value, _ in terms:
                unit = trial.unit(value)
                if unit is not None:
                    if unit.shift is not None:
                        trial.refuse_shift(node, reasons.GATE_SHIFT)
                    known[value] = lift(unit, value, z).turned(inverse).scale
            break
        except NotInvertibleError:
            known = {}
    else:
        trial.refuse(node, reasons.UNDOES_ZERO_SCALE)
    if all(scale is None for scale in known.values()):
        return
    sides: dict[int, Tensor | None] = {1: None, -1: None}
    for value, power in terms:
        sides[power] = multiply(sides[power], known.get(value))
        if power > 0 and value is not z:
            _ratio(None, known.get(value))  # nothing may be divided by 0
    left, right = sides[1], sides[-1]
    open_terms = [(value, power) for value, power in terms if value not in known]
    if not open_terms:
        if not _equal(left, right):
            trial.refuse(node, reasons.SCALES_DO_NOT_FIT)
        return
    if _equal(left, right):
        return
    alternatives = []
    reason: NotInvertibleError | None = None
    for value, power in sorted(open_terms, key=lambda term: 3 if term[0] is z else cost(term[0])):
        try:
            scale = _ratio(right, left) if power > 0 else _ratio(left, right)
            if power > 0 and value is not z:
                _ratio(None, scale)
        except NotInvertibleError as error:
            reason = error
            continue
        unit = lower(Unit.of(scale, None, inverse), value, z)
        if unit is not None:
            alternatives.append({value: unit})
    if not alternatives and reason is not None:
        raise reason
    if not alternatives:
        trial.refuse(node, reasons.FACTOR_IS_BROADCAST)
    if len(open_terms) == 1:
        for value, unit in alternatives[0].items():
            trial.demand(value, unit)
    else:
        trial.choose(node, alternatives, scale=True)


def _combined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The product of two scales, None where one undoes the other: ``s*(1/s)`` is not always 1."""
    made = multiply(a, b)
    return made if a is None or b is None or not _equal(made, None) else None


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """True if two scales are the same up to rounding."""
    return Unit(a).same_as(Unit(b))


def _ratio(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a/b``, and 1 where both are 0, since there any scale fits; raises NotInvertibleError where b alone is 0."""
    if a is None or b is None:
        return a if b is None else reciprocal(b)
    both = (a == 0) & (b == 0)
    return torch.where(both, 1.0, a) * reciprocal(torch.where(both, 1.0, b))
