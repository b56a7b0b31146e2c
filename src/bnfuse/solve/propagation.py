"""One attempt to remove one norm (a *trial*): units propagate through the graph until nothing is left to settle.

A demand on a value is a demand on its producer and on every consumer; their rules answer with further demands or
refuse. When nothing is left to settle, the absorbers turn the units into edits of parameters, and an edit stands only
if every use of the parameter asks for it. A trial is accepted whole or leaves nothing behind. Accepted edits are
composed: the next trial sees the network as it would then be. What a trial finds out of tensors that holds whatever
norm is tried is kept, and spares later ones the way along a stream (:mod:`bnfuse.solve.fixed_units`).

The graph and its tensors are only read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.graph.norms import Site
from bnfuse.reasons import Cause, Reason
from bnfuse.rules import ABSORBERS, RULES
from bnfuse.rules.registry import Rule, link, same
from bnfuse.rules.shapes import is_rearrangement
from bnfuse.solve import parallel_layer
from bnfuse.solve.checks import agree, check_edits, check_shifts, not_shared
from bnfuse.solve.fixed_units import fixed
from bnfuse.solve.network import Network, Refusal
from bnfuse.units import (
    IDENTITY,
    NotInvertibleError,
    Unit,
)

_MAX_BACKTRACKS = 200


class TooFarError(Exception):
    """A trial has not come to its end within its limit."""


@dataclass(frozen=True)
class _Choice:
    """A point to go back to: how much was settled, what was still to be chosen, and the other ways to go on."""

    settled: int
    pending: dict[Node, None]
    alternatives: Iterator[Mapping[Value, Unit]]
    scale: bool


class Trial:
    """One attempt to remove one norm in one direction; see :class:`bnfuse.rules.Trial` for what rules may call."""

    def __init__(self, network: Network, targets: Collection[Node] = ()) -> None:
        self.network = network
        self._steps_left = math.inf
        self._backtracks = self._deepest = 0
        self._is_far = self._looks_back = False
        self._applied: Node | None = None
        self._first: tuple[Reason, bool] | None = None
        self.targets = set(targets)
        self.units: dict[Value, Unit] = {}
        self.edits: dict[Value, dict[Node, Unit]] = {}
        self.composed: dict[Value, tuple[Tensor | None, Tensor | None]] = {}
        self._queue: deque[Node] = deque()
        self._queued: set[Node] = set()
        self._pending: dict[Node, None] = {}
        self._touched: dict[Node, None] = {}
        self._trail: list[Value] = []
        self._choices: list[_Choice] = []
        self._choosing: Node | None = None
        self._chosen: Sequence[Mapping[Value, Unit]] = ()
        self._chosen_scale = False

    # What rules call ---------------------------------------------------------------------------------------------

    def unit(self, value: Value) -> Unit | None:
        return self.units.get(value)

    def unit_or_identity(self, value: Value) -> Unit:
        return self.units.get(value, IDENTITY)

    def demand(self, value: Value, unit: Unit) -> None:
        present = self.units.get(value)
        if present is not None:
            if present is unit:
                return
            if not agree(present, unit):
                self._refuse_value(value, reasons.TWO_UNITS.reason(), unit)
            return
        if unit.is_identity:
            self.units[value] = IDENTITY
        else:
            if value.pinned is not None:
                self._refuse_value(value, value.pinned, unit)
            if not value.dtype.is_floating_point:
                self._refuse_value(value, reasons.IS_NOT_FLOATING.reason(dtype=value.dtype), unit)
            broken = self.network.limits.refusal(value, unit, self.targets, self.network.removed)
            if broken is not None:
                raise Refusal(*broken)
            if self._is_far:
                self._check_learned(value, unit)
            self.units[value] = unit
        self._trail.append(value)
        for node in value.consumers if value.producer is None else (value.producer, *value.consumers):
            if node not in self._queued:
                self._queued.add(node)
                self._queue.append(node)

    def pass_on(self, source: Value, target: Value, change: Callable[[Unit], Unit]) -> None:
        unit = self.units[source]
        moved = change(unit)
        if not self.network.limits.are_tied(source, target) and (change is same or _keeps_scale(unit, moved, change)):
            self.tie((source, target))
        self.demand(target, moved)

    def tie(self, values: Iterable[Value]) -> None:
        if self._applied not in self.network.steps:
            first, *others = values
            for other in others:
                self.network.limits.tie(first, other)

    def bears_scale(self, value: Value) -> bool:
        return self.network.limits.bears_scale(value)

    def share(self, node: Node, parameter: Value, other: Node, value: Value, unit: Unit) -> None:
        try:
            self.demand(value, unit)
        except Refusal as refusal:
            raise Refusal(not_shared(parameter, node, other), refusal.scale) from None

    def postpone(self, node: Node) -> bool:
        if node is self._choosing:
            return False
        self._pending[node] = None
        return True

    def choose(self, node: Node, alternatives: Sequence[Mapping[Value, Unit]], scale: bool = False) -> None:
        if not self.postpone(node):
            self._chosen, self._chosen_scale = alternatives, scale

    def refuse(self, node: Node, cause: Cause, **values: Any) -> NoReturn:
        raise Refusal(cause.reason(*node.place, **values), True)

    def refuse_shift(self, node: Node, cause: Cause, **values: Any) -> NoReturn:
        raise Refusal(cause.reason(*node.place, **values), False)

    def refuse_unit(self, node: Node, unit: Unit, cause: Cause, **values: Any) -> NoReturn:
        raise Refusal(cause.reason(*node.place, **values), unit.scale is not None)

    def refuse_any(self, node: Node, values: Iterable[Value], cause: Cause) -> NoReturn:
        self._refuse_always(node, values, cause, negative=False)

    def refuse_negative(self, node: Node, values: Iterable[Value], cause: Cause) -> NoReturn:
        self._refuse_always(node, values, cause, negative=True)

    def _refuse_always(self, node: Node, values: Iterable[Value], cause: Cause, negative: bool) -> NoReturn:
        reason = cause.reason(*node.place)
        if node not in self.network.steps:
            for value in values:
                self.network.limits.learn(value, reason, node, negative)
        raise Refusal(reason, True)

    def edit(self, node: Node, value: Value, unit: Unit) -> None:
        if unit.is_identity:
            if value in self.units and value.kind is Kind.COMPUTED:
                self.demand(value, IDENTITY)  # refuses what another use of the same parameter has asked for
            return
        for part in (unit.scale, unit.shift, None if unit.entries is None else unit.entries.values):
            if part is not None and not math.isfinite(part.sum()):
                self.refuse(node, reasons.EDIT_NOT_FINITE)
        if value.kind is Kind.COMPUTED:
            self.demand(value, unit)
            return
        requests = self.edits.setdefault(value, {})
        if node in requests and not agree(requests[node], unit):
            self.refuse_shift(node, reasons.TWO_EDITS_AT_ONE_OPERATOR)
        requests[node] = unit

    def content(self, value: Value) -> Tensor:
        return self.network.content(value)

    def once(self, weight: tuple[Value, bool, int], vector: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return self.network.once(weight, vector, make)

    def pieces(self, value: Value) -> Iterator[Tensor]:
        return self.network.pieces(value)

    def assume(self, node: Node) -> None:
        if node in self.network.varying:
            self.refuse(node, reasons.NUMBERS_DEPEND_ON_INPUT)

    def placed(self, value: Value) -> tuple[Tensor | None, Tensor | None]:
        return self.network.placed(value)

    def is_edited(self, value: Value) -> bool:
        return value in self.network.edits

    def accept(self) -> None:
        """Make what the trial has found a part of the network."""
        edits = {value: next(iter(requests.values())) for value, requests in self.edits.items()}
        self.network.accept(self.targets, edits, self.composed)

    # The search --------------------------------------------------------------------------------------------------

    def run(self, demands: Mapping[Value, Unit], limit: int | None = None) -> None:
        """Settle everything that follows from the demands.

        Args:
            demands: what to begin with.
            limit: of operators to look at, None for as many as it takes.

        Raises:
            Refusal: something cannot be met.
            TooFarError: the limit is reached; `go_on` continues.
        """
        self._steps_left = math.inf if limit is None else limit
        for value, unit in demands.items():
            self.demand(value, unit)
        self._search()

    def go_on(self, limit: int | None) -> None:
        """Go on with a run that went too far, by so many operators; raises as `run`.

        Without a limit, it asks what earlier trials have found out.
        """
        self._steps_left = math.inf if limit is None else limit
        self._is_far = self._looks_back = limit is None
        self._search()

    def _search(self) -> None:
        while True:
            try:
                self._settle()
                return
            except Refusal as refusal:
                self._first = self._first or (refusal.reason, refusal.scale)
                self._backtracks += 1
                while refusal.scale and self._choices and not self._choices[-1].scale:
                    self._choices.pop()  # no other place for a shift would help
                most = _MAX_BACKTRACKS + 2 * self._deepest  # a stream of hundreds of sums may go back at each of them
                if self._backtracks > most or self._next_alternative() is not None:
                    raise Refusal(*self._first) from None

    def run_beside(self, layers: Sequence[tuple[parallel_layer.Sibling, Site, Tensor, Tensor]]) -> None:
        """Let a layer beside each site of the norm take it up; raises Refusal if one cannot."""
        for sibling, site, a, c in layers:
            parallel_layer.absorb(sibling, site, a, c, self)
        check_edits(self.network, self.edits)

    def _check_learned(self, value: Value, unit: Unit) -> None:
        reason = self.network.limits.learned_refusal(value, unit)
        if reason is not None:
            raise Refusal(reason, True)

    def _look_back(self) -> None:
        """Look whether what was settled nearby is known to be refused far away."""
        for place, value in enumerate(self._trail):
            try:
                self._check_learned(value, self.units[value])
            except Refusal:
                while self._choices and self._choices[-1].settled > place:
                    self._choices.pop()  # no other choice after it would help
                raise
        self._looks_back = False

    def _settle(self) -> None:
        if self._looks_back:
            self._look_back()
        while True:
            self._drain()
            if self._pending:
                self._decide(next(iter(self._pending)))
                continue
            self.edits = {}
            for node in self._touched:
                self._apply(ABSORBERS[node.operator], node)
            if not self._queue:
                break
        self._collect_leaves()
        check_edits(self.network, self.edits)
        self.composed = {
            value: self.network.composed(value, unit)
            for value, unit in self.units.items()
            if not unit.is_identity and not value.independent and self.is_read(value)
        }
        check_shifts(self.composed)

    def _drain(self) -> None:
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(node)
            if node in self.targets:
                continue
            if node in self.network.removed:
                assert node.data is not None
                if is_rearrangement(node):
                    self._apply(RULES[node.operator], node)
                else:
                    self._applied = None
                    link(self, node.data, node.outputs[0], same, same)
                continue
            if all(
                self.units.get(value, IDENTITY).is_identity for value in (*node.inputs, *node.absent, *node.outputs)
            ):
                continue
            if node.operator in ABSORBERS:
                self._touched[node] = None
            rule = RULES.get(node.operator)
            self._steps_left -= 1
            if self._steps_left < 0:
                self._queue.appendleft(node)
                self._queued.add(node)
                raise TooFarError
            if rule is not None:
                self._apply(rule, node)
            else:
                self.refuse_any(node, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES)

    def _apply(self, rule: Rule, node: Node) -> None:
        self._applied = node
        try:
            rule(node, self)
        except NotInvertibleError:
            self.refuse(node, reasons.UNDOES_ZERO_SCALE)

    def _decide(self, node: Node) -> None:
        del self._pending[node]
        self._choosing, self._chosen = node, []
        self._apply(RULES[node.operator], node)
        self._choosing = None
        chosen = list(self._chosen)
        if chosen:
            choice = _Choice(len(self._trail), dict(self._pending), iter(chosen), self._chosen_scale)
            self._choices.append(choice)
            self._deepest = max(self._deepest, len(self._choices))
            refusal = self._next_alternative()
            if refusal is not None:
                raise Refusal(refusal, scale=True)  # every alternative was tried

    def _next_alternative(self) -> Reason | None:
        """Go back to the last choice that has another way to go on, and take it; why not, if there is none."""
        last = reasons.NO_CHOICE_LEFT.reason()
        while self._choices:
            choice = self._choices[-1]
            length = choice.settled
            self._queue.clear()
            self._queued.clear()
            self._choosing = None
            for value in self._trail[length:]:
                del self.units[value]
            del self._trail[length:]
            self._pending = dict(choice.pending)
            units = next(choice.alternatives, None)
            if units is None:
                self._choices.pop()
                continue
            try:
                for value, unit in units.items():
                    self.demand(value, unit)
            except Refusal as refusal:
                last = refusal.reason
                continue
            return None
        return last

    def _collect_leaves(self) -> None:
        """A parameter that was given units as an operand is edited; all operators that read it as one agreed."""
        for value, unit in self.units.items():
            if value.kind in (Kind.PARAMETER, Kind.ABSENT) and value.producer is None and not unit.is_identity:
                try:
                    contents = Unit(*unit.direct())
                except NotInvertibleError:
                    self._refuse_value(value, reasons.PARAMETER_UNDOES_ZERO_SCALE.reason(), unit)
                if value.kind is Kind.ABSENT and contents.shift is None and not self.is_edited(value):
                    continue  # a bias that need not be created
                requests = self.edits.setdefault(value, {})
                for node in value.consumers:
                    if node.operator not in ABSORBERS:
                        requests[node] = contents

    def is_read(self, value: Value) -> bool:
        """True if an operator that stays reads the value."""
        return any(node not in self.targets and node not in self.network.removed for node in value.consumers)

    def _refuse_value(self, value: Value, why: Reason, unit: Unit) -> NoReturn:
        raise Refusal(fixed(value, why), unit.scale is not None)


def _keeps_scale(unit: Unit, moved: Unit, change: Callable[[Unit], Unit]) -> bool:
    """True if a change hands the elements of a scale on with their signs, in whatever order, as it did with a unit."""
    if unit.scale is None or not _same_elements(unit.scale, moved.scale):
        return False
    try:
        return _same_elements(-unit.scale, change(Unit(-unit.scale, None, unit.inverse)).scale)
    except (Refusal, NotInvertibleError):
        return False


def _same_elements(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a is b:
        return a is b
    return a.numel() == b.numel() and torch.equal(a.reshape(-1).sort().values, b.reshape(-1).sort().values)
