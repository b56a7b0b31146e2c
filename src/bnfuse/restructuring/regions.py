"""Linear regions of a graph: everything between one tensor and another, where nobody else sees what is in between."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from bnfuse.graph.graph import Node, Value
from bnfuse.restructuring.borders import Borders
from bnfuse.restructuring.linear_maps import LinearMap, NotOneLayerError
from bnfuse.restructuring.recipes import LINEAR, Reader, Recipe, Steps, axes_of, data_inputs

_LARGEST = 150
"""So many operators at most are one region."""


@dataclass(frozen=True)
class Price:
    """What it takes to compute something.

    Attributes:
        products: multiplications.
        traffic: numbers that are read or written.
    """

    products: int = 0
    traffic: int = 0

    def __add__(self, other: Price) -> Price:
        return Price(self.products + other.products, self.traffic + other.traffic)

    def is_less_than(self, other: Price) -> bool:
        """Whether there are no more multiplications, and less is read and written."""
        return self.products <= other.products and self.traffic < other.traffic


def price_of_node(node: Node) -> Price:
    """What an operator takes at the sizes of its run.

    An operator on each number by itself counts as traffic alone, and a norm as nothing, since most go without this.
    """
    if not node.outputs or node.operator in _FREE:
        return Price()
    y = node.outputs[0].elements
    x = sum(value.elements for value in data_inputs(node))
    weight = node.bound.get("weight")
    if node.operator == "batch_norm":
        return Price()
    if weight is None:
        return Price(0, x + y)
    out = node.outputs[0].shape[-1 if node.operator == "linear" else 1]
    return Price(y // max(out, 1) * weight.elements, x + y + weight.elements)


_FREE = frozenset({"detach", "slice", "select", "narrow"})
"""Operators that only look at a tensor in another way."""


def price_of_layer(made: LinearMap, x: Value, y: Value) -> Price:
    """What one layer takes in place of everything between two values."""
    return Price(y.elements // max(made.channels_out, 1) * made.products, x.elements + y.elements + made.products)


@dataclass(frozen=True, eq=False)
class Region:
    """A linear part of a run.

    Attributes:
        root, result: what it reads and what it makes.
        nodes: its operators.
        recipe: what they do.
        shape: the map, on the meta device, as a layer does it.
    """

    root: Value
    result: Value
    nodes: frozenset[Node]
    recipe: Recipe
    shape: LinearMap

    @property
    def before(self) -> Price:
        """What its operators take."""
        return sum(map(price_of_node, self.nodes), Price())

    @property
    def after(self) -> Price:
        """What one layer takes."""
        return price_of_layer(self.shape, self.root, self.result)

    @property
    def gains(self) -> bool:
        """Whether one layer takes less."""
        return self.after.is_less_than(self.before)

    @property
    def gain(self) -> tuple[int, int]:
        """How much less: numbers that are read and written, and multiplications."""
        before, after = self.before, self.after
        return before.traffic - after.traffic, before.products - after.products


def region(root: Value, result: Value, steps: Steps, borders: Borders) -> Region:
    """All that lies between two values.

    Args:
        borders: of the model that was recorded.

    Raises:
        NotOneLayerError: no single layer does this, or somebody else sees what lies between.
    """
    axes = {found for node in _between(root, result, borders) if (found := axes_of(node)) is not None}
    if len(axes) != 1:
        raise NotOneLayerError("no layer, or layers over different axes")
    reader = Reader(root, axes.pop(), steps, borders)
    step = reader.step(result)
    nodes = frozenset(reader.nodes)
    _check_closed(root, result, nodes, reader.values, borders)
    recipe = Recipe(step, reader.axes, root.shape[reader.axis])
    made = Region(root, result, nodes, recipe, recipe.follow_shapes().with_padding_of_a_layer())
    steps.check_borders(recipe, lambda held: borders.contents(held.names[0]))
    return made


def _between(root: Value, result: Value, borders: Borders) -> Iterator[Node]:
    """The operators from one value back to another; those beyond are not entered."""
    seen = {root}
    waiting = [result]
    count = 0
    while waiting:
        value = waiting.pop()
        node = borders.maker(value)
        if value in seen or node is None:
            continue
        seen.add(value)
        count += 1
        if count > _LARGEST or node.operator not in LINEAR:
            raise NotOneLayerError("an operator is not linear")
        yield node
        waiting += data_inputs(node)


def _check_closed(
    root: Value, result: Value, nodes: frozenset[Node], values: Sequence[Value], borders: Borders
) -> None:
    """Raise NotOneLayerError if something outside reads what lies between, or the region writes to what it reads."""
    for value in values:
        if value is root or value is result:
            continue
        if borders.is_seen(value):
            raise NotOneLayerError("something else sees a term")
        if any(reader not in nodes for reader in value.consumers):
            raise NotOneLayerError("a term is read elsewhere")
    for node in nodes:
        if any(value.storage is root.storage for value in node.written):
            raise NotOneLayerError("it writes to what it reads")
    if result.storage is root.storage:
        raise NotOneLayerError("its result is a view of what it reads")


def roots(result: Value, inside: Container[Node], borders: Borders) -> Iterator[Value]:
    """The values that everything which makes another one comes from, through linear operators, the nearest first.

    Args:
        inside: operators that may be gone through.
        borders: of the model that was recorded.
    """
    front = {result}
    for _ in range(_LARGEST):
        last = max(front, key=lambda value: -1 if (node := borders.maker(value)) is None else node.index)
        node, border = borders.maker(last), borders.of(last)
        if node is None or node not in inside or node.operator not in LINEAR:
            return
        if border is not None and any(each not in inside for each in border.nodes):
            return
        front.remove(last)
        front.update(data_inputs(node))
        if not front:
            return
        if len(front) == 1:
            yield next(iter(front))
