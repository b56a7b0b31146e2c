"""The graph with the edits that were accepted so far, and the contents that parameters have with them.

It is only read and added to; the tensors of the model are never written to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse import reasons
from bnfuse.graph.graph import Graph, Kind, Node, Value
from bnfuse.reasons import Reason
from bnfuse.rules.norm_statistics import affine, affine_together, offset, offsets_together
from bnfuse.rules.shapes import is_rearrangement, rearranged
from bnfuse.solve.aliasing import Memory
from bnfuse.solve.fixed_units import Limits
from bnfuse.solve.layout import Layouts
from bnfuse.units import (
    PIECE,
    NotInvertibleError,
    Unit,
    add,
    multiply,
    row_ranges,
    scaled,
)


class Refusal(Exception):
    """A trial has failed; ``scale`` says that no other place for a shift would help."""

    def __init__(self, reason: Reason, scale: bool) -> None:
        super().__init__(reason, scale)
        self.reason = reason
        self.scale = scale

    def __str__(self) -> str:
        return str(self.reason)


class Network:
    """The graph with everything that was accepted so far.

    Attributes:
        varying: operators whose numbers are others in another call.
        steps: the operators of norms that are written as arithmetic, which pass nothing on while their norm is tried.
        removed: the operators of norms that go.
        edits: the new contents of each parameter, one after the other.
    """

    def __init__(
        self,
        graph: Graph,
        varying: Collection[Node] = (),
        forbidden: Collection[nn.Module] = (),
        steps: Collection[Node] = (),
    ) -> None:
        self.nodes = graph.nodes
        self.varying = varying
        self.steps = steps
        self.memory = Memory(forbidden)
        nodes = sorted([*graph.nodes, *graph.paths], key=lambda node: node.index)  # what a bias is added to comes first
        self.layouts = Layouts(nodes)
        self.limits = Limits(nodes)
        self.removed: set[Node] = set()
        self.edits: dict[Value, list[Unit]] = {}
        self._placed: dict[Value, tuple[Tensor | None, Tensor | None]] = {}
        self._contents = _statistics(graph.nodes)
        self._products: dict[tuple[Value, bool, int], tuple[Tensor, Tensor]] = {}
        self._replays: dict[Value, Tensor] = {}
        self._affine = affine_together(graph.nodes, self._contents)
        self._offsets: dict[Node, float] = {}

    def affine(self, nodes: Sequence[Node]) -> tuple[Tensor, Tensor, Unit | None]:
        """(a, c) of ``y = a*x + c``, of the steps of a norm, as it is at present; and the unit that they are, None if
        they are not finite."""
        if len(nodes) == 1 and nodes[0] in self._affine:
            return self._affine[nodes[0]]
        a, c = (torch.full((), number, dtype=torch.float64, device="cpu") for number in (1.0, 0.0))
        for node in nodes:
            if is_rearrangement(node):
                a, c = (rearranged(node, part) if part.dim() else part for part in (a, c))
            else:
                factor, term = affine(node, self)
                a, c = a * factor, c * factor + term
        if a.shape != c.shape:
            a, c = a.expand_as(c + a), c.expand_as(c + a)
        return a, c, Unit.of(a, c) if math.isfinite(a.sum() + c.sum()) else None

    def offset(self, node: Node) -> float:
        """How far a mean of a step of a norm lies from 0 at present, in standard deviations."""
        if not self._offsets:
            self._offsets = offsets_together(self.nodes, self._contents)
        known = None if node.argument("input") in self._placed else self._offsets.get(node)
        return offset(node, self) if known is None else known

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

    def once(self, weight: tuple[Value, bool, int], vector: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` makes of a weight and a vector. In another call the same weight is asked for the same."""
        if weight[0].producer is not None:
            return make()
        known = self._products.get(weight)
        if known is None or not torch.equal(known[0], vector):
            known = self._products[weight] = (vector, make())
        return known[1]

    def pieces(self, value: Value) -> Iterator[Tensor]:
        """The same in pieces of rows, each of which is gone when the next one is asked for."""
        source = value.tensor
        if value.kind is not Kind.PARAMETER or source is None or source.numel() <= PIECE or source.device.type != "cpu":
            yield self.content(value)
            return
        scratch = torch.empty(0, dtype=torch.float64, device="cpu")
        for start, size in row_ranges(source):
            rows = source.detach().narrow(0, start, size)
            scratch = scratch if scratch.numel() >= rows.numel() else scratch.new_empty(rows.numel())
            piece = scratch[: rows.numel()].view(rows.shape).copy_(rows)
            for unit in self.edits.get(value, ()):
                piece = edited(piece, unit.rows(start, size))
            yield piece

    def _replayed(self, value: Value) -> Tensor:
        """What the recorded operators make, in float64, of the present parameters."""
        known = self._replays.get(value)
        if known is not None:
            return known
        nodes = self._replay_order(value)
        uses = Counter(operand for node in nodes for operand in _operands(node))
        contents = {operand: self.content(operand) for operand in uses if not self._is_replayed(operand)}
        for node in nodes:
            contents.update(_replay(node, contents))
            for operand in _operands(node):
                uses[operand] -= 1
                if not uses[operand]:
                    contents.pop(operand, None)  # weights may be large, and chains of operators long
            self._replays.update(
                (made, contents[made]) for made in node.outputs if made in contents and made.elements <= _SMALL
            )
        return contents[value]

    def _replay_order(self, value: Value) -> list[Node]:
        """The operators that make a value, each after those whose results it reads.

        Raises:
            Refusal: one of them cannot be run again.
        """
        order: dict[Node, None] = {}
        entered: set[Node] = set()
        waiting = [value]
        while waiting:
            node = waiting[-1].producer
            if node is None or not waiting[-1].independent or waiting[-1].pinned is not None:
                raise Refusal(reasons.CONTENTS_DEPEND_ON_RUN.reason(), scale=False)
            if node in order:
                waiting.pop()
            elif node in entered:
                order[node] = None
            else:
                self._check_replay(node)
                entered.add(node)
                waiting += [operand for operand in reversed(_operands(node)) if self._is_replayed(operand)]
        return list(order)

    def _is_replayed(self, value: Value) -> bool:
        return value.kind is Kind.COMPUTED and value not in self._contents and value not in self._replays

    def _check_replay(self, node: Node) -> None:
        self._assume([node])
        if torch.Tag.nondeterministic_seeded in node.overload.tags:
            raise Refusal(reasons.IS_RANDOM.reason(node.operator, node.call.label), scale=False)
        if (node.overload._schema.is_mutable and node.operator != "detach") or any(
            made.tensor is not None for made in node.outputs
        ):
            raise Refusal(reasons.CONTENTS_ARE_WRITTEN.reason(node.operator, node.call.label), scale=False)

    def _assume(self, nodes: Collection[Node]) -> None:
        """A table that the code makes itself may depend on the size of the input."""
        for node in nodes:
            if node in self.varying:
                raise Refusal(reasons.CONTENTS_DEPEND_ON_SIZE.reason(*node.place), scale=False)

    def assume(self, node: Node) -> None:
        """Refuse where the numbers of a norm are others in another call."""
        if node in self.varying:
            raise Refusal(reasons.NUMBERS_DEPEND_ON_INPUT.reason(*node.place), True)

    def accept(
        self,
        targets: Collection[Node],
        edits: Mapping[Value, Unit],
        composed: Mapping[Value, tuple[Tensor | None, Tensor | None]],
    ) -> None:
        """Take what a trial has found.

        Args:
            targets: the operators of the norm that goes.
            edits: the new contents of parameters.
            composed: scale and shift of all units that values have been given so far.
        """
        self.removed.update(targets)
        for node in targets:
            if node.data is not None:
                self.limits.unite(node.data, node.outputs[0])
        self._placed.update(composed)
        self._products = {weight: known for weight, known in self._products.items() if weight[0] not in edits}
        if edits:
            self._replays.clear()
        for value, unit in edits.items():
            self.edits.setdefault(value, []).append(unit)
            self._contents.pop(value, None)
            for node in value.consumers:
                self._affine.pop(node, None)

    def placed(self, value: Value) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of all units that accepted removals have given to a value."""
        return self._placed.get(value, _NOTHING)

    def composed(self, value: Value, unit: Unit) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of all units that a value has been given, with another one."""
        before = self.placed(value)
        try:
            s, t = unit.direct()
        except NotInvertibleError:
            return before  # a dead channel, which nothing that stays can read
        return multiply(before[0], s), add(scaled(before[1], s), t)


_NOTHING = (None, None)


def _operands(node: Node) -> list[Value]:
    """The values that a replay of an operator reads."""
    return list(dict.fromkeys(node.inputs))


def _replay(node: Node, contents: Mapping[Value, Tensor]) -> Iterator[tuple[Value, Tensor]]:
    """What an operator makes of these contents, on the CPU."""

    def replaced(argument: Any) -> Any:
        if isinstance(argument, Value):
            return contents[argument]
        return type(argument)(map(replaced, argument)) if isinstance(argument, (tuple, list)) else argument

    if node.operator in _CASTS and node.outputs[0].dtype.is_floating_point:
        yield node.outputs[0], contents[node.inputs[0]]
        return
    arguments = {name: replaced(argument) for name, argument in node.bound.items()}
    if arguments.get("device") is not None:
        arguments["device"] = torch.device("cpu")
    try:
        made = _tensors(node.overload(**arguments))
    except Exception as error:  # (an operator that does not take float64, or no memory)
        raise Refusal(reasons.CONTENTS_DEPEND_ON_RUN.reason(), scale=False) from error
    if len(made) != len(node.outputs):  # some of them are what it was given
        raise Refusal(reasons.CONTENTS_DEPEND_ON_RUN.reason(), scale=False)
    for output, tensor in zip(node.outputs, made, strict=True):
        yield output, tensor.double() if tensor.is_floating_point() else tensor  # zeros(n) has float32 of its own


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in _tensors(item)]
    return [result] if isinstance(result, Tensor) else []


_CASTS = ("to", "_to_copy", "type_as")
"""Operators that round, which a replay in float64 does not."""

_SMALL = 1 << 12
"""Replayed contents of up to so many elements are kept, since rules ask for those along a chain one after the other."""


def _initial(value: Value) -> Tensor:
    if value.kind is Kind.ABSENT:
        fill = 1.0 if value.names[0].endswith("weight") else 0.0
        return torch.full(value.shape, fill, dtype=torch.float64, device="cpu")
    if value.tensor is None:
        raise Refusal(reasons.CONTENTS_DEPEND_ON_RUN.reason(), scale=False)
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
        dead = unit.scale == 0
        if bool(dead.any()):
            tensor = tensor.where(~dead, 0.0)  # of a bound, which may be infinite
    if unit.shift is not None:
        tensor = tensor + unit.shift
    return tensor if unit.entries is None else unit.entries.add_to(tensor.clone())
