"""One attempt to remove one norm (a *trial*): units propagate through the graph until nothing is left to settle.

A demand on a value is a demand on its producer and on every consumer; their rules answer with further demands or
refuse. When nothing is left to settle, the absorbers turn the units into edits of parameters, and an edit stands only
if every use of the parameter asks for it. A trial is accepted whole or leaves nothing behind. Accepted edits are
composed: the next trial sees the network as it would then be.

The graph and its tensors are only read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bnfuse.graph.graph import Graph, Kind, Node, Value
from bnfuse.graph.norms import Site
from bnfuse.reasons import (
    CONTENTS_ARE_WRITTEN,
    CONTENTS_DEPEND_ON_RUN,
    CONTENTS_DEPEND_ON_SIZE,
    EDIT_NOT_FINITE,
    IS_NO_PARAMETER,
    IS_NOT_FLOATING,
    IS_RANDOM,
    NO_CHOICE_LEFT,
    NOTHING_PASSES,
    NUMBERS_DEPEND_ON_INPUT,
    OUT_OF_RANGE,
    PARAMETER_UNDOES_ZERO_SCALE,
    SHARED_WEIGHT,
    SHIFT_TOO_LARGE,
    TWO_EDITS_AT_ONE_OPERATOR,
    TWO_UNITS,
    UNDOES_ZERO_SCALE,
    WEIGHT_FIXED,
    Cause,
    Reason,
)
from bnfuse.rules import ABSORBERS, RULES
from bnfuse.rules.norm_statistics import affine, affine_together, offset, offsets_together
from bnfuse.rules.registry import Rule, link, same
from bnfuse.solve import parallel_layer as beside
from bnfuse.solve.aliasing import Memory
from bnfuse.solve.fixed_units import Limits, fixed
from bnfuse.solve.layout import Layouts
from bnfuse.units import (
    IDENTITY,
    PIECE,
    SAFE_SCALE,
    NotInvertibleError,
    Unit,
    add,
    multiply,
    row_ranges,
    scaled,
)

_MAX_BACKTRACKS = 200

_LARGEST_SHIFT = {torch.float64: 1e7, torch.float32: 1e4, torch.float16: 100.0, torch.bfloat16: 100.0}
"""The largest shift, in the units that values had at first, of a tensor that something else still reads."""


class TooFarError(Exception):
    """A trial has not come to its end within its limit."""


class Refusal(Exception):
    """A trial has failed; ``scale`` says that no other place for a shift would help."""

    def __init__(self, reason: Reason, scale: bool) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.scale = scale


class Network:
    """The graph with everything that was accepted so far."""

    def __init__(self, graph: Graph, varying: Collection[Node] = (), forbidden: Collection[nn.Module] = ()) -> None:
        self.nodes = graph.nodes
        self.varying = varying
        self.memory = Memory(forbidden)
        nodes = [*graph.paths, *graph.nodes]
        self.layouts = Layouts(nodes)
        self.limits = Limits(nodes)
        self.assumed: set[Node] = set()
        self.removed: set[Node] = set()
        self.edits: dict[Value, list[Unit]] = {}
        self.placed: dict[Value, tuple[Tensor | None, Tensor | None]] = {}
        self._contents = _statistics(graph.nodes)
        self._affine = affine_together(graph.nodes, self._contents)
        self._offsets: dict[Node, float] = {}

    def affine(self, nodes: Sequence[Node]) -> tuple[Tensor, Tensor, Unit | None]:
        """(a, c) of ``y = a*x + c``, of the steps of a norm, as it is at present; and the unit that they are, None if
        they are not finite."""
        first, *rest = nodes
        if not rest and first in self._affine:
            return self._affine[first]
        a, c = affine(first, Trial(self))
        for node in rest:
            factor, term = affine(node, Trial(self))
            a, c = a * factor, c * factor + term
        if a.shape != c.shape:
            a, c = a.expand_as(c + a), c.expand_as(c + a)
        return a, c, Unit.of(a, c) if math.isfinite(a.sum() + c.sum()) else None

    def offset(self, node: Node) -> float:
        """How far a mean of a step of a norm lies from 0 at present, in standard deviations."""
        if not self._offsets:
            self._offsets = offsets_together(self.nodes, self._contents)
        known = None if node.argument("input") in self.placed else self._offsets.get(node)
        return offset(node, Trial(self)) if known is None else known

    def content(self, value: Value) -> Tensor:
        """Present float64 contents of a parameter. Vectors are kept, since norms are read again and again."""
        if value in self._contents:
            return self._contents[value]
        if value.kind is Kind.COMPUTED:
            return self._replayed(value)
        if value.kind is Kind.CONSTANT and not value.names:
            self._assume(value.consumers)
        tensor = _initial(value)
        for unit in self.edits.get(value, ()):
            tensor = edited(tensor, unit)
        if tensor.dim() <= 1:
            self._contents[value] = tensor
        return tensor

    def pieces(self, value: Value) -> Iterator[Tensor]:
        """The same in pieces of rows, each of which is gone when the next one is asked for."""
        source = value.tensor
        if value.kind is not Kind.PARAMETER or source is None or source.numel() <= PIECE or source.device.type != "cpu":
            yield self.content(value)
            return
        scratch = torch.empty(0, dtype=torch.float64)
        for start, size in row_ranges(source):
            rows = source.detach().narrow(0, start, size)
            scratch = scratch if scratch.numel() >= rows.numel() else scratch.new_empty(rows.numel())
            piece = scratch[: rows.numel()].view(rows.shape).copy_(rows)
            for unit in self.edits.get(value, ()):
                piece = edited(piece, unit.rows(start, size))
            yield piece

    def _replayed(self, value: Value) -> Tensor:
        """What the recorded operators make, in float64, of the present parameters."""
        node = value.producer
        if node is None or not value.independent or value.pinned is not None:
            raise Refusal(CONTENTS_DEPEND_ON_RUN.reason(), scale=False)

        self._assume([node])

        def contents(argument: Any) -> Any:
            if isinstance(argument, Value):
                return self.content(argument)
            return type(argument)(map(contents, argument)) if isinstance(argument, (tuple, list)) else argument

        if node.operator in ("to", "_to_copy", "type_as") and node.outputs[0].dtype.is_floating_point:
            return self.content(node.inputs[0])
        if torch.Tag.nondeterministic_seeded in node.overload.tags:
            raise Refusal(IS_RANDOM.reason(node.operator, node.call.label), scale=False)
        if node.overload._schema.is_mutable and node.operator != "detach":
            raise Refusal(CONTENTS_ARE_WRITTEN.reason(node.operator, node.call.label), scale=False)
        result = node.overload(**{name: contents(argument) for name, argument in node.bound.items()})
        results = [result] if isinstance(result, Tensor) else list(result)
        return results[node.outputs.index(value)]

    def _assume(self, nodes: Collection[Node]) -> None:
        """A table that the code makes itself may depend on the size of the input."""
        for node in nodes:
            if node in self.varying:
                raise Refusal(CONTENTS_DEPEND_ON_SIZE.reason(*node.place), scale=False)
        self.assumed.update(nodes)

    def accept(self, trial: Trial) -> None:
        self.removed.update(trial.targets)
        for node in trial.targets:
            if node.data is not None:
                self.limits.unite(node.data, node.outputs[0])
        self.assumed |= trial.assumed
        self.placed.update(trial.composed)
        for value, requests in trial.edits.items():
            unit = next(iter(requests.values()))
            self.edits.setdefault(value, []).append(unit)
            self._contents.pop(value, None)
            for node in value.consumers:
                self._affine.pop(node, None)

    def composed(self, value: Value, unit: Unit) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of all units that a value has been given, with another one."""
        before = self.placed.get(value, (None, None))
        try:
            s, t = unit.direct()
        except NotInvertibleError:
            return before  # a dead channel, which nothing that stays can read
        return multiply(before[0], s), add(scaled(before[1], s), t)


def _initial(value: Value) -> Tensor:
    if value.kind is Kind.ABSENT:
        fill = 1.0 if value.names[0].endswith("weight") else 0.0
        return torch.full(value.shape, fill, dtype=torch.float64)
    if value.tensor is None:
        raise Refusal(CONTENTS_DEPEND_ON_RUN.reason(), scale=False)
    tensor = value.tensor.detach()
    return tensor.to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)


def _statistics(nodes: Collection[Node]) -> dict[Value, Tensor]:
    """Contents of the vectors of all batch norms, which are converted together: they are many and small."""
    alike: dict[tuple[torch.dtype, torch.device], dict[Value, Tensor]] = {}
    for node in nodes:
        if node.operator == "batch_norm":
            for value in node.inputs:
                tensor = value.tensor
                plain = value.kind is Kind.PARAMETER and type(tensor) in (Tensor, nn.Parameter)
                if plain and tensor is not None and tensor.dim() == 1 and tensor.is_floating_point():
                    alike.setdefault((tensor.dtype, tensor.device), {})[value] = tensor.detach()
    return {
        value: contents
        for vectors in alike.values()
        for value, contents in zip(
            vectors,
            torch.cat(list(vectors.values())).to("cpu", torch.float64).split([len(v) for v in vectors.values()]),
            strict=True,
        )
    }


def edited(tensor: Tensor, unit: Unit) -> Tensor:
    """The contents after an edit."""
    if unit.scale is not None:
        tensor = tensor * unit.scale
    if unit.shift is not None:
        tensor = tensor + unit.shift
    return tensor if unit.entries is None else unit.entries.add_to(tensor.clone())


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
        self.assumed: set[Node] = set()
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
            try:
                agree = present.same_as(unit)
            except NotInvertibleError:
                agree = False
            if not agree:
                self._refuse_value(value, TWO_UNITS.reason(), unit)
            return
        if unit.is_identity:
            self.units[value] = IDENTITY
        else:
            if value.pinned is not None:
                self._refuse_value(value, value.pinned, unit)
            if not value.dtype.is_floating_point:
                self._refuse_value(value, IS_NOT_FLOATING.reason(dtype=value.dtype), unit)
            broken = self.network.limits.refusal(value, unit, self.targets, self.network.removed)
            if broken is not None:
                raise Refusal(*broken)
            self.units[value] = unit
        self._trail.append(value)
        for node in value.consumers if value.producer is None else (value.producer, *value.consumers):
            if node not in self._queued:
                self._queued.add(node)
                self._queue.append(node)

    def share(self, node: Node, parameter: Value, other: Node, value: Value, unit: Unit) -> None:
        try:
            self.demand(value, unit)
        except Refusal as refusal:
            raise Refusal(_shared(parameter, node, other), refusal.scale) from None

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

    def edit(self, node: Node, value: Value, unit: Unit) -> None:
        if unit.is_identity:
            if value in self.units and value.kind is Kind.COMPUTED:
                self.demand(value, IDENTITY)  # refuses what another use of the same parameter has asked for
            return
        for part in (unit.scale, unit.shift, None if unit.entries is None else unit.entries.values):
            if part is not None and not math.isfinite(part.sum()):
                self.refuse(node, EDIT_NOT_FINITE)
        if value.kind is Kind.COMPUTED:
            self.demand(value, unit)
            return
        requests = self.edits.setdefault(value, {})
        if node in requests and not agree(requests[node], unit):
            self.refuse_shift(node, TWO_EDITS_AT_ONE_OPERATOR)
        requests[node] = unit

    def content(self, value: Value) -> Tensor:
        return self.network.content(value)

    def pieces(self, value: Value) -> Iterator[Tensor]:
        return self.network.pieces(value)

    def assume(self, node: Node) -> None:
        if node in self.network.varying:
            self.refuse(node, NUMBERS_DEPEND_ON_INPUT)
        self.assumed.add(node)

    def placed(self, value: Value) -> tuple[Tensor | None, Tensor | None]:
        return self.network.placed.get(value, (None, None))

    def is_edited(self, value: Value) -> bool:
        return value in self.network.edits

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
        """Go on with a run that went too far, by so many operators; raises as `run`."""
        self._steps_left = math.inf if limit is None else limit
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

    def run_beside(self, layers: Sequence[tuple[beside.Sibling, Site, Tensor, Tensor]]) -> None:
        """Let a layer beside each site of the norm take it up; raises Refusal if one cannot."""
        for sibling, site, a, c in layers:
            beside.absorb(sibling, site, a, c, self)
        self._check_edits()

    def _settle(self) -> None:
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
        self._check_edits()
        self._check_shifts()

    def _drain(self) -> None:
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(node)
            if node in self.targets:
                continue
            if node in self.network.removed:
                assert node.data is not None
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
                self.refuse(node, NOTHING_PASSES)

    def _apply(self, rule: Rule, node: Node) -> None:
        try:
            rule(node, self)
        except NotInvertibleError:
            self.refuse(node, UNDOES_ZERO_SCALE)

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
        last = NO_CHOICE_LEFT.reason()
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
                    self._refuse_value(value, PARAMETER_UNDOES_ZERO_SCALE.reason(), unit)
                requests = self.edits.setdefault(value, {})
                for node in value.consumers:
                    if node.operator not in ABSORBERS:
                        requests[node] = contents

    def _check_edits(self) -> None:
        """An edited parameter must be editable, and every use of it must ask for the same edit."""
        for value, requests in self.edits.items():
            if value.pinned is not None or value.kind not in (Kind.PARAMETER, Kind.ABSENT, Kind.LAYER):
                why = value.pinned or IS_NO_PARAMETER.reason()
                raise Refusal(WEIGHT_FIXED.reason(why=why, parameter=_label(value)), False)
            node, unit = next(iter(requests.items()))
            for other in value.consumers:
                if other not in requests or not agree(unit, requests[other]):
                    raise Refusal(_shared(value, node, other), False)
            if value in self.network.edits and self._scaled_up(value, unit) > SAFE_SCALE:
                self.refuse(node, UNDOES_ZERO_SCALE)  # little by little, with what went before
            if value.dtype is torch.float16 and not self._in_range(value, unit):
                self.refuse(node, OUT_OF_RANGE, parameter=_label(value), dtype=value.dtype)

    def is_read(self, value: Value) -> bool:
        """True if an operator that stays reads the value."""
        return any(node not in self.targets and node not in self.network.removed for node in value.consumers)

    def _check_shifts(self) -> None:
        """A shift that is much larger than what is left of the values takes away their digits."""
        self.composed = {
            value: self.network.composed(value, unit)
            for value, unit in self.units.items()
            if not unit.is_identity and not value.independent and self.is_read(value)
        }
        looked_at = set()
        for value, (scale, shift) in self.composed.items():
            if scale is None or shift is None or (id(scale), id(shift), value.dtype) in looked_at:
                continue
            looked_at.add((id(scale), id(shift), value.dtype))
            alive = scale != 0
            largest = float((shift.abs() / scale.abs().where(alive, torch.inf)).amax())
            if largest > _LARGEST_SHIFT.get(value.dtype, 0.0):
                node = value.producer
                where = (None, None) if node is None else node.place
                raise Refusal(SHIFT_TOO_LARGE.reason(*where, ratio=largest), False)

    def _scaled_up(self, value: Value, unit: Unit) -> float:
        """The largest factor that an element of a parameter is multiplied by in all."""
        scale: Tensor | None = None
        for other in (*self.network.edits[value], unit):
            scale = multiply(scale, other.scale)
        return 1.0 if scale is None or not scale.numel() else float(scale.abs().amax())

    def _in_range(self, value: Value, unit: Unit) -> bool:
        if value.kind is Kind.LAYER:
            return True
        return float(edited(self.content(value), unit).abs().amax()) <= torch.finfo(value.dtype).max

    def _refuse_value(self, value: Value, why: Reason, unit: Unit) -> NoReturn:
        raise Refusal(fixed(value, why), unit.scale is not None)


def _shared(parameter: Value, node: Node, other: Node) -> Reason:
    return SHARED_WEIGHT.reason(*node.place, parameter=_label(parameter), other=other)


def _label(parameter: Value) -> str:
    return " = ".join(parameter.names) or "a weight"


def agree(a: Unit, b: Unit) -> bool:
    try:
        return a.same_as(b)
    except NotInvertibleError:
        return False
