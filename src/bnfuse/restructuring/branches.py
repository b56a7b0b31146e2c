"""Sums of branches in code that stays: one branch becomes the sum of several, and the others give nothing.

Where a ``forward`` adds up what several of its children make of one tensor, and does more than that, the code stays as
it is: ``a(x) + b(x) + rest``. The child that is called first is replaced by one layer that does what both do, and the
other by `bnfuse.model.nothing.Nothing`, which gives a zero without axes. So the sum has one tensor less to make and to
read.

A sum is taken apart into its terms as far as nobody else sees the partial sums. A term takes part if it is what a call
of a module makes of one tensor and nothing else. Which terms are worth merging is found by joining two groups of terms,
those that gain most, until no two gain anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bnfuse.graph.graph import ModuleCall, Node, Value
from bnfuse.reasons import LAYER_DIFFERS
from bnfuse.restructuring.linear_maps import NotOneLayerError
from bnfuse.restructuring.ownership import Owners, StaysError
from bnfuse.restructuring.recipes import LINEAR, Recipe, Step, Steps, Sum
from bnfuse.restructuring.regions import Price, Region, price_of_layer, region

_LONGEST = 4
"""So many calls at most make a term."""

_SUMS = {"add": (1.0, 1.0), "sub": (1.0, -1.0)}


@dataclass(frozen=True, eq=False)
class Term:
    """A term of a sum that calls make, one after the other.

    Attributes:
        calls: the outermost that make it of one tensor.
        factor: by which it takes part in the sum.
        made: what the calls do.
    """

    calls: tuple[ModuleCall, ...]
    factor: float
    made: Region


@dataclass(frozen=True, eq=False)
class Branches:
    """Terms of one sum that are one layer.

    Attributes:
        terms: the first is where the layer stands.
        recipe: what the layer does.
        together: the same as a region, of no operators.
        before, after: what is saved, and what is left of it.
    """

    terms: tuple[Term, ...]
    together: Region
    before: Price
    after: Price

    @property
    def key(self) -> tuple[object, ...]:
        """What is the same for another call of the same modules."""
        modules = tuple(tuple(id(call.module) for call in term.calls) for term in self.terms)
        return modules, self.together.recipe.step


def sums(nodes: Sequence[Node]) -> Iterator[Node]:
    """The operators that finish a sum of tensors which depend on the input."""
    for node in nodes:
        if _operands(node) is None:
            continue
        (made,) = node.outputs
        if made.pinned is None and len(made.consumers) == 1 and _operands(made.consumers[0]) is not None:
            continue  # part of a larger one
        yield node


def _operands(node: Node) -> tuple[tuple[Value, float], tuple[Value, float]] | None:
    """The two tensors that an operator adds, each with its factor."""
    if node.operator not in _SUMS or len(node.outputs) != 1:
        return None
    x, y = node.bound["self"], node.bound["other"]
    if not (isinstance(x, Value) and isinstance(y, Value)) or x.independent or y.independent or x is y:
        return None
    if x.shape != y.shape or x.dtype != y.dtype or not x.dtype.is_floating_point:
        return None
    first, second = _SUMS[node.operator]
    alpha = node.argument("alpha", 1)
    return None if isinstance(alpha, complex) else ((x, first), (y, second * float(alpha)))


class Search:
    """Finds branches in the sums of a recorded model."""

    def __init__(self, owners: Owners, steps: Steps) -> None:
        self.owners, self.steps = owners, steps
        self._makers: dict[Value, list[ModuleCall]] = {}
        for call in owners.graph.calls:  # inner calls return first
            if call.plain and len(call.inputs) == len(call.outputs) == 1 and call.inputs[0] is not call.outputs[0]:
                self._makers.setdefault(call.outputs[0], []).append(call)

    def of(self, last: Node) -> Iterator[Branches]:
        """The branches of the sum that an operator finishes."""
        values, adds = _terms(last)
        by_root: dict[Value, list[Term]] = {}
        for value, factor in values:
            for term in self._made_by_calls(value, factor):
                group = by_root.setdefault(term.made.root, [])
                if not any(other.made.result is value for other in group):  # the outermost call comes first
                    group.append(term)
        for group in by_root.values():
            yield from self._groups(sorted(group, key=lambda term: _place(term, adds)), adds)

    def _made_by_calls(self, value: Value, factor: float) -> Iterator[Term]:
        if self.owners.borders.is_seen(value) or len(value.consumers) != 1 or not factor:
            return
        waiting: list[tuple[ModuleCall, ...]] = [()]
        while waiting:
            behind = waiting.pop(0)
            end = behind[0].inputs[0] if behind else value
            if behind and (self.owners.borders.is_seen(end) or not set(end.consumers) <= set(behind[0].all_nodes)):
                continue
            for call in reversed(self._makers.get(end, ()) if len(behind) < _LONGEST else ()):
                calls = (call, *behind)
                try:
                    made = region(call.inputs[0], value, self.steps, self.owners.borders)
                except NotOneLayerError:
                    made = None
                if made is not None and made.nodes <= {node for each in calls for node in each.all_nodes}:
                    yield Term(calls, factor, made)
                if made is not None or (call.nodes and all(node.operator in LINEAR for node in call.all_nodes)):
                    waiting.append(calls)

    def _groups(self, terms: Sequence[Term], adds: Sequence[Node]) -> Iterator[Branches]:
        """Groups of terms that gain as one layer."""
        groups: list[tuple[Term, ...]] = [(term,) for term in terms]
        found: dict[tuple[Term, ...], Branches] = {}
        while len(groups) > 1:
            best: Branches | None = None
            for one, other in itertools.combinations(groups, 2):
                joined = tuple(term for term in terms if term in (*one, *other))
                price = sum(
                    (found[each].after if each in found else each[0].made.before for each in (one, other)), Price()
                )
                made = self._together(joined, adds, price)
                if made is not None and (best is None or _gain(made) > _gain(best)):
                    best, pair = made, (one, other)
            if best is None:
                break
            groups = [group for group in groups if group not in pair]
            groups.append(best.terms)
            found[best.terms] = best
        for group in groups:
            if group in found:
                before = sum((term.made.before for term in group), Price())
                yield replace(found[group], before=before)

    def _together(self, terms: tuple[Term, ...], adds: Sequence[Node], price: Price) -> Branches | None:
        """Terms as one layer, None if that gains nothing or the sum cannot be made without the others."""
        holder = terms[0]
        nothing = {term.made.result for term in terms[1:]}
        modules = [id(call.module) for term in terms for call in term.calls]
        if not _can_do_without(nothing, adds) or len({*modules}) < len(modules):
            return None
        parts: list[tuple[Step, float]] = [(term.made.recipe.step, term.factor / holder.factor) for term in terms]
        if len({(term.made.recipe.axes, term.made.recipe.channels) for term in terms}) != 1:
            return None
        step = self.steps.one(Sum(tuple(parts)))
        recipe = Recipe(step, holder.made.recipe.axes, holder.made.recipe.channels)
        try:
            shape = recipe.follow_shapes().with_padding_of_a_layer()
        except NotOneLayerError:
            return None
        nodes = frozenset(node for term in terms for node in term.made.nodes)
        together = Region(holder.made.root, holder.made.result, nodes, recipe, shape)
        after = price_of_layer(shape, together.root, together.result)
        # Each sum with nothing reads a tensor less.
        saved = Price(0, together.result.elements * (len(terms) - 1))
        return Branches(terms, together, price, after) if after.is_less_than(price + saved) else None


def _gain(made: Branches) -> tuple[int, int]:
    return made.before.traffic - made.after.traffic, made.before.products - made.after.products


def _terms(last: Node) -> tuple[list[tuple[Value, float]], list[Node]]:
    """The terms of a sum with their factors, and the operators that scale and add them, in their order."""
    found: list[tuple[Value, float]] = []
    adds: list[Node] = []
    scalings: list[Node] = []
    waiting: list[tuple[Node, float]] = [(last, 1.0)]
    while waiting:
        node, outer = waiting.pop()
        adds.append(node)
        for value, factor in _operands(node) or ():
            reader, scale = node, outer * factor
            maker = _only(value, reader)
            while maker is not None and (scaled := _scaled(maker)) is not None:
                value, reader = scaled[0], maker
                scale *= scaled[1]
                scalings.append(maker)
                maker = _only(value, reader)
            if maker is not None and _operands(maker) is not None:
                waiting.append((maker, scale))
            else:
                found.append((value, scale))
    return found, sorted([*adds, *scalings], key=lambda node: node.index)


def _only(value: Value, reader: Node) -> Node | None:
    """What makes a value that nobody sees but one operator."""
    return value.producer if value.pinned is None and value.consumers == [reader] else None


def _scaled(node: Node) -> tuple[Value, float] | None:
    """The tensor in ``factor*x + number``, and the factor."""
    x, number = node.bound.get("self"), node.argument("other", -1.0)
    if not isinstance(x, Value) or isinstance(number, (Value, complex)) or len(node.outputs) != 1:
        return None
    if x.independent or not x.dtype.is_floating_point or x.dtype != node.outputs[0].dtype:
        return None
    if node.operator in ("add", "sub"):
        return x, 1.0
    if node.operator == "rsub":
        return (x, -1.0) if node.argument("alpha", 1) == 1 else None
    if node.operator not in ("mul", "div", "neg") or node.argument("rounding_mode") is not None or not number:
        return None
    return x, 1 / float(number) if node.operator == "div" else float(number)


def _place(term: Term, adds: Sequence[Node]) -> tuple[int, int]:
    """Terms that are written to come first, then those that are made first."""
    written = any(term.made.result in node.written for node in adds)
    return (not written, term.made.result.index)


def _can_do_without(nothing: set[Value], adds: Sequence[Node]) -> bool:
    """Whether a sum can be made if some of its terms are zeros without axes."""
    gone = set(nothing)
    for node in adds:
        if all(value in gone for value in node.inputs):
            gone.add(node.outputs[0])
        if any(value in gone for value in node.written) and node.outputs[0] not in gone:
            return False
    return True


def check(branches: Branches, others: Sequence[Branches], owners: Owners) -> set[Node]:
    """The operators that the branches take away, of all calls.

    Args:
        others: the branches of all sums.

    Raises:
        StaysError: their modules do something else in another call, or serve something else.
    """
    same = [other for other in others if other.key == branches.key]
    for number, term in enumerate(branches.terms):
        for place, call in enumerate(term.calls):
            calls = {id(each) for each in owners.calls[id(call.module)]}
            if calls != {id(other.terms[number].calls[place]) for other in same}:
                raise StaysError(LAYER_DIFFERS.reason())
    nodes = {node for other in same for node in other.together.nodes}
    owners.check([call.module for term in branches.terms for call in term.calls], (), nodes)
    return nodes
