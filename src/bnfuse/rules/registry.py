"""Where the rules of the operators are registered, and what a rule may call.

A rule is a function ``rule(node, trial)``. It reads the units that the trial has given to the node's values so far
and demands what follows from them on the others. Where nothing has a rule, nothing passes. Rules know units and the
graph; they never see a module or write to a tensor.

An operator with parameters may also have an *absorber*: ``absorber(node, trial)`` runs when all units are settled
and asks for the edits of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any, NoReturn, Protocol

from torch import Tensor

from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.reasons import Cause
from bnfuse.units import Unit


class Contents(Protocol):
    """What is known of the numbers of a network: enough to read what a norm does."""

    def content(self, value: Value) -> Tensor:
        """The present float64 contents, with all edits so far, of what does not depend on the model's inputs."""

    def pieces(self, value: Value) -> Iterator[Tensor]:
        """The same in pieces of rows, each of which is gone when the next one is asked for."""

    def once(self, weight: tuple[Value, bool, int], vector: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` makes of a weight, with how it is read, and a vector; for the same ones it is made once."""

    def placed(self, value: Value) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of all units that accepted removals have given to the input of a batch norm."""

    def assume(self, node: Node) -> None:
        """Rely on the numbers given to an operator being the same for inputs of any size; refuses if they are not."""


class Trial(Contents, Protocol):
    """What a rule sees of an attempt to remove a norm."""

    def unit(self, value: Value) -> Unit | None:
        """The unit demanded of a value, None if nothing was demanded (which means: it stays as it is)."""

    def unit_or_identity(self, value: Value) -> Unit:
        """The unit demanded of a value; the identity if nothing was."""

    def demand(self, value: Value, unit: Unit) -> None:
        """Ask for a unit; refuses if the value has another one already or cannot change."""

    def pass_on(self, source: Value, target: Value, change: Callable[[Unit], Unit]) -> None:
        """Ask of a value for what follows from the unit of another one, whatever units others have: see `link`.

        Where a scale is handed on as it is, the two are tied.
        """

    def tie(self, values: Iterable[Value]) -> None:
        """Tell all trials: if one of the values has a scale, so have all, whatever units others have.

        They have the same one, in any order of its elements, or 1 over it; so what one can never have, none can.
        """

    def bears_scale(self, value: Value) -> bool:
        """False if it is known that the value can have no scale, whatever units others have."""

    def share(self, node: Node, parameter: Value, other: Node, value: Value, unit: Unit) -> None:
        """Ask for a unit at another operator that reads the same parameter, so that both ask for the same edit."""

    def postpone(self, node: Node) -> bool:
        """Put a choice off until everything that is certain is settled; False if that is now."""

    def choose(self, node: Node, alternatives: Sequence[Mapping[Value, Unit]], scale: bool = False) -> None:
        """Several ways to go on, to be tried in turn once everything that is certain is settled.

        ``scale`` says that they place a scale differently, not only a shift.
        """

    def refuse(self, node: Node, cause: Cause, **values: Any) -> NoReturn:
        """Give up: nothing passes, or not this scale, so that moving shifts does not help.

        Args:
            values: the fields of the text of the cause.
        """

    def refuse_shift(self, node: Node, cause: Cause, **values: Any) -> NoReturn:
        """Give up because of a shift; the search goes on with other places for it."""

    def refuse_unit(self, node: Node, unit: Unit, cause: Cause, **values: Any) -> NoReturn:
        """Give up because of a whole unit: as `refuse` if it has a scale, as `refuse_shift` if it has none."""

    def refuse_any(self, node: Node, values: Iterable[Value], cause: Cause) -> NoReturn:
        """Give up as `refuse`, and tell all trials that no scale of one of the values passes, whatever units others
        have."""

    def refuse_negative(self, node: Node, values: Iterable[Value], cause: Cause) -> NoReturn:
        """Give up as `refuse`, and tell all trials that no negative scale of one of the values passes, whatever units
        others have."""

    def edit(self, node: Node, value: Value, unit: Unit) -> None:
        """Ask, from an absorber, for new contents ``scale*old + shift`` of a parameter.

        An absorber asks for the identity too, for each of its parameters: one may be a part of a larger one, of
        which another operator asks for something else.
        """

    def is_edited(self, value: Value) -> bool:
        """True if an accepted edit changed the parameter."""


Rule = Callable[[Node, Trial], None]
"""A rule or an absorber. Where it raises NotInvertibleError, the trial refuses to undo a scale of (nearly) 0."""


class Family(Enum):
    """What operators have in common, for whoever asks about an operator without running its rule."""

    POSITIVE = auto()
    """Linear on each side of 0: passes a scale that is not negative, and no shift."""
    SUM = auto()
    """Its operands of full shape and its result have one scale."""
    AVERAGE = auto()
    """Its input and its result have one scale, where it passes any."""
    REARRANGEMENT = auto()
    """One result with the elements of the first input, each once."""
    CONCATENATION = auto()
    """One result with the elements of all inputs, each once."""
    PARTITION = auto()
    """Each result has some elements of the first input."""
    FIXED = auto()
    """Neither a scale nor a shift of an input or of a result passes."""


RULES: dict[str, Rule] = {}
ABSORBERS: dict[str, Rule] = {}
FAMILIES: dict[str, Family] = {}


def rule(*operators: str, family: Family | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by their names without namespace, overload and in-place underscore.

    Its docstring says what passes; the page of operators in the documentation is made from that.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
            if family is None:
                FAMILIES.pop(operator, None)
            else:
                FAMILIES[operator] = family
        return function

    return register


def absorber(*operators: str) -> Callable[[Rule], Rule]:
    """Register how the parameters of operators take up units."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            ABSORBERS[operator] = function
        return function

    return register


def link(
    trial: Trial,
    x: Value,
    y: Value,
    forward: Callable[[Unit], Unit],
    backward: Callable[[Unit], Unit],
    always: bool = True,
) -> None:
    """Tie the units of two values: each follows from the other.

    Args:
        always: False if that depends on the units: for others the rule does something else.
    """
    ask = trial.pass_on if always else lambda source, target, change: trial.demand(target, change(trial.unit(source)))
    unit = trial.unit(x)
    if unit is not None:
        if not (unit.is_identity and trial.unit(y) is None):
            ask(x, y, forward)
        return
    unit = trial.unit(y)
    if unit is not None and not unit.is_identity:
        ask(y, x, backward)


def forbid(node: Node, trial: Trial, values: Iterable[Value], cause: Cause, always: bool = True) -> None:
    """Refuse if one of the values has units: all of them must stay as they are.

    Args:
        always: False if that depends on the units: for others the rule does something else.
    """
    values = list(values)
    if not all(trial.unit_or_identity(value).is_identity for value in values):
        if always:
            trial.refuse_any(node, values, cause)
        trial.refuse(node, cause)


def same(unit: Unit) -> Unit:
    return unit


def lift(unit: Unit, value: Value, whole: Value) -> Unit:
    """The unit of an operand, aligned to the result that it is broadcast to."""
    missing = len(whole.shape) - len(value.shape)
    return unit.map(lambda tensor: tensor.reshape([1] * missing + list(tensor.shape))) if missing else unit


def lower(unit: Unit, value: Value, whole: Value) -> Unit | None:
    """A unit that is aligned to a result as the unit of an operand; None if the operand lacks an axis for it."""
    missing = len(whole.shape) - len(value.shape)
    for axis in unit.axes():
        if axis < missing or value.shape[axis - missing] == 1:
            return None
    return unit.map(lambda tensor: tensor.reshape(tensor.shape[missing:])) if missing else unit


def cost(value: Value) -> int:
    """How far a unit is likely to travel from here: parameters and layers that feed only this operator come first."""
    if value.kind in (Kind.PARAMETER, Kind.ABSENT):
        return 0
    if len(value.consumers) == 1:
        return 1 if value.independent or (value.producer and value.producer.operator in ABSORBERS) else 2
    return 4
