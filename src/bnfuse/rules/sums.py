r"""Sums of tensors or numbers.

``z = x + k*y`` with ``x_new = s*x + t``, ``y_new = s*y + u`` is ``z_new = s*z + (t + k*u)``: one common scale, and the
shifts add up, so a shift may sit on either operand or go on to the sum. In the inverse direction the same holds with
the inverse scale and shift. A unit that varies along an axis on which an operand is broadcast cannot be that
operand's. A parameter is an operand like any other: it is edited to take its unit.

A bias that is read several times changes alike at each: where ``x`` holds ``m`` times the bias and ``y`` holds ``n``
times the same one, a shift ``v`` of ``z`` is ``v*m/(m + k*n)`` of x and ``v*n/(m + k*n)`` of y.

A number ``d`` cannot be edited: ``z = x + d`` gives ``z_new = s*z + (t + d*(1 - s))``.
"""

from __future__ import annotations

from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.rules.identity import HANDED_ON, ZEROS
from bnfuse.rules.layers import has_content
from bnfuse.rules.registry import Family, Trial, cost, lift, link, lower, rule, same
from bnfuse.units import NotInvertibleError, Unit, add


@rule("add", "sub", "rsub", family=Family.SUM)
def add_tensors(node: Node, trial: Trial) -> None:
    """Two tensors: one scale for both operands and the result; the shifts add up.

    ``s*x + t1 + k*(s*y + t2) = s*(x + k*y) + (t1 + k*t2)``; the units vary only along axes that the operand has.
    With a number d any units pass, and the shift grows by ``d*(1 - s)``; the number must be the same at every input
    size. Zeros that the code makes and that are broadcast are the number 0.
    """
    z = node.outputs[0]
    x, y = node.bound["self"], node.bound["other"]
    terms = linear_terms(node)
    if terms is None:
        trial.refuse(node, reasons.IS_COMPLEX)
    if not isinstance(x, Value) or not isinstance(y, Value):
        _add_number(node, trial, terms, z)
        return
    for one, zero in (terms, terms[::-1]):
        if _is_number_zero(zero[0], trial, z) and isinstance(one[0], Value) and one[0].shape == z.shape:
            _add_number(node, trial, (one, (0.0, zero[1])), z)
            return
    factors = (terms[0][1], terms[1][1])
    if x is y:
        link(
            trial,
            x,
            z,
            lambda unit: _times(unit, sum(factors)),
            lambda unit: _divided(node, trial, unit, factors),
        )
    elif node.absent and not _may_take_shift(node, trial, y):
        link(trial, x, z, same, same)
    else:
        _Sum(node, trial, (x, y), factors, z).settle()


def _is_number_zero(operand: Value | float, trial: Trial, z: Value) -> bool:
    """Whether an operand that is broadcast is zeros that the code has made, and has no units."""
    if not isinstance(operand, Value) or operand.shape == z.shape:
        return False
    return trial.unit(operand) is None and _is_zero(operand, trial)


def _is_zero(value: Value, trial: Trial) -> bool:
    """Whether a tensor is zeros that the code has made, or what it has computed of nothing else."""
    node = value.producer
    if node is None or node.operator in ZEROS:
        return node is not None
    if node.operator in ("add", "sub", "rsub"):
        operands = (node.bound["self"], node.bound["other"])
        if not all(_is_zero(it, trial) if isinstance(it, Value) else it == 0 for it in operands):
            return False
        if len(node.inputs) < 2:
            trial.assume(node)  # the number 0, with which Python's own sum begins
        return True
    if node.operator in ("mul", "div"):
        x, number = node.bound["self"], node.bound["other"]
        return isinstance(x, Value) and not isinstance(number, Value) and number != 0 and _is_zero(x, trial)
    return node.operator in HANDED_ON and _is_zero(node.inputs[0], trial)


def _may_take_shift(node: Node, trial: Trial, bias: Value) -> bool:
    """False if a bias that does not exist yet need not be created, or has no axis for the units."""
    x, z = node.bound["self"], node.outputs[0]
    units = [unit for unit in (trial.unit(x), trial.unit(z)) if unit is not None]
    if trial.unit(bias) is not None or has_content(bias, trial):
        return True
    return any(unit.shift is not None for unit in units) and all(lower(unit, bias, z) is not None for unit in units)


def linear_terms(node: Node) -> tuple[tuple[Value | float, float], tuple[Value | float, float]] | None:
    """The two operands of a sum or difference, and the factor of each; None if a number is complex."""
    x, y, alpha = node.bound["self"], node.bound["other"], node.argument("alpha", 1)
    if any(isinstance(number, complex) for number in (x, y, alpha)):
        return None
    alpha = float(alpha)
    first, second = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[node.operator]
    return (x, first), (y, second)


def _add_number(
    node: Node, trial: Trial, terms: tuple[tuple[Value | float, float], tuple[Value | float, float]], z: Value
) -> None:
    """``z = sign*x + added``."""
    (x, sign), (number, factor) = terms if isinstance(terms[0][0], Value) else terms[::-1]
    assert isinstance(x, Value)
    assert not isinstance(number, Value)
    added = float(number) * factor

    if sign == 0:
        trial.refuse(node, reasons.MULTIPLIES_BY_ZERO)

    def forward(unit: Unit) -> Unit:
        unit = _times(unit, sign)
        if unit.scale is None or added == 0:
            return unit
        trial.assume(node)
        return Unit(unit.scale, add(unit.shift, added * (1 - unit.scale)), unit.inverse)

    def backward(unit: Unit) -> Unit:
        if unit.scale is not None and added != 0:
            trial.assume(node)
            unit = Unit(unit.scale, add(unit.shift, -added * (1 - unit.scale)), unit.inverse)
        return _times(unit, 1 / sign)

    link(trial, x, z, forward, backward)


def _times(unit: Unit, factor: float) -> Unit:
    return Unit(unit.scale, None if unit.shift is None else unit.shift * factor, unit.inverse)


def _divided(node: Node, trial: Trial, unit: Unit, factors: tuple[float, float]) -> Unit:
    if unit.shift is not None and sum(factors) == 0:
        trial.refuse_shift(node, reasons.SUBTRACTS_FROM_ITSELF)
    return Unit(unit.scale, None if unit.shift is None else unit.shift / sum(factors), unit.inverse)


class _Sum:
    """The equation ``z = k0*x0 + k1*x1`` on units, aligned to the shape of z."""

    def __init__(
        self, node: Node, trial: Trial, operands: tuple[Value, Value], factors: tuple[float, float], z: Value
    ) -> None:
        self.node, self.trial, self.z = node, trial, z
        # z - k0*x0 - k1*x1 = 0
        self.terms: list[tuple[Value, float]] = [
            (z, 1.0),
            *((x, -k) for x, k in zip(operands, factors, strict=True)),
        ]

    def settle(self) -> None:
        known = {value: lift(unit, value, self.z) for value, _ in self.terms if (unit := self.trial.unit(value))}
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
                self.trial.refuse_shift(self.node, reasons.SHIFTS_DO_NOT_ADD_UP)
        elif len(open_terms) == 1:
            value, factor = open_terms[0]
            if scale is not None or rest is not None:
                self._demand(value, Unit(scale, None if rest is None else -rest / factor, inverse))
        elif rest is None:
            # Two open terms could have opposite shifts: one may yet be given by what else reads it.
            if scale is not None and not self.trial.postpone(self.node):
                for value, _ in open_terms:
                    self._demand(value, Unit(scale, None, inverse))
        elif not self.trial.postpone(self.node):
            self._offer(open_terms, scale, rest, inverse)

    def _offer(self, open_terms: list[tuple[Value, float]], scale: Tensor | None, rest: Tensor, inverse: bool) -> None:
        alternatives = self._shares(open_terms, scale, rest, inverse)
        for taker, factor in sorted(open_terms, key=lambda term: 3 if term[0] is self.z else cost(term[0])):
            units = {}
            for value, _ in open_terms:
                shift = -rest / factor if value is taker else None
                unit = Unit.of(scale, shift, inverse)
                lowered = lower(unit, value, self.z)
                if lowered is None:
                    if scale is not None and value is not taker:
                        self._demand(value, unit)  # refuses
                    break
                units[value] = lowered
            else:
                alternatives.append(units)
        if not alternatives:
            self.trial.refuse_shift(self.node, reasons.NO_AXIS_FOR_SHIFT)
        self.trial.choose(self.node, alternatives)

    def _shares(
        self, operands: list[tuple[Value, float]], scale: Tensor | None, rest: Tensor, inverse: bool
    ) -> list[dict[Value, Unit]]:
        """The shift in parts, where both operands hold the same bias, which changes alike wherever it is read."""
        if any(value is self.z for value, _ in operands):
            return []
        biases, times = zip(*(_bias_of(value) for value, _ in operands), strict=True)
        parts = [factor * part for (_, factor), part in zip(operands, times, strict=True)]
        total, size = sum(parts), sum(map(abs, parts))
        if biases[0] is None or biases[0] is not biases[1] or abs(total) < 1e-6 * size or not size:
            return []
        units = {}
        for (value, _), part in zip(operands, times, strict=True):
            lowered = lower(Unit.of(scale, -rest * (part / total), inverse), value, self.z)
            if lowered is None:
                return []
            units[value] = lowered
        return [units]

    def _demand(self, value: Value, unit: Unit) -> None:
        self.trial.tie(term for term, _ in self.terms if self._must_follow(term))
        lowered = lower(unit, value, self.z)
        if lowered is None:
            self.trial.refuse_unit(self.node, unit, reasons.OPERAND_IS_BROADCAST)
        self.trial.demand(value, lowered)

    def _must_follow(self, term: Value) -> bool:
        """False for what may also keep its units: a bias that does not exist yet, and what may be zeros."""
        return term.kind is not Kind.ABSENT and (term.shape == self.z.shape or term.producer is None)

    def _same_direction(self, known: dict[Value, Unit]) -> dict[Value, Unit]:
        directions = {unit.inverse for unit in known.values() if not unit.is_identity}
        if len(directions) < 2:
            return known
        for inverse in (False, True):
            try:
                return {value: unit.turned(inverse) for value, unit in known.items()}
            except NotInvertibleError:
                continue
        return self.trial.refuse(self.node, reasons.UNDOES_ZERO_SCALE)

    def _common_scale(self, known: dict[Value, Unit]) -> Tensor | None:
        units = list(known.values())
        first = units[0].scale_only()
        for unit in units[1:]:
            try:
                agree = first.same_as(unit.scale_only())
            except NotInvertibleError:
                agree = False
            if not agree:
                self.trial.refuse(self.node, reasons.DIFFERENT_SCALES)
        return first.scale


_STEPS = 32
"""Operators between a bias and a sum that are looked at."""


def _bias_of(value: Value) -> tuple[Value | None, float]:
    """The bias that layers add to make a tensor, and how many times it; None if they have none in common."""
    bias, total, waiting = None, 0.0, [(value, 1.0)]
    for _ in range(_STEPS):
        value, times = waiting.pop()
        node = value.producer
        if node is None:
            return None, 0.0
        given = node.argument("bias")
        if isinstance(given, Value):
            while given.producer is not None and given.producer.inputs:
                given = given.producer.inputs[0]  # of which it is a part
            if bias is not None and bias is not given:
                return None, 0.0
            bias, total = given, total + times
        elif node.data is not None:
            number = node.argument("other")
            if node.operator in ("mul", "div") and isinstance(number, (int, float)) and number:
                times *= number if node.operator == "mul" else 1 / number
            waiting.append((node.data, times))
        elif node.operator in ("add", "sub") and len(node.inputs) == 2:
            terms = linear_terms(node)
            if terms is None:
                return None, 0.0
            waiting += [(term, times * factor) for term, factor in terms if isinstance(term, Value)]
        else:
            return None, 0.0
        if not waiting:
            return bias, total
    return None, 0.0


def _magnitude(known: dict[Value, Unit]) -> Tensor | float:
    magnitude: Tensor | float = 1e-300
    for unit in known.values():
        if unit.shift is not None:
            magnitude = magnitude + unit.shift.abs()
    return magnitude
