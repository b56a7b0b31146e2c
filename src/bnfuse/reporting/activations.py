r"""What the layers of two models give on the same input: where they differ, and which numbers occur.

Without its norms a model computes other activations, on purpose: a tensor ``v`` of the original is ``s*v + t`` in the
fused model, per channel. So the change of units is undone before the two are compared. Its scale and shift are those of
the plan, in float64, every accepted removal on top of the ones before (:mod:`bnfuse.solve.search`):

    direct    new = scale*old + shift,   so  old = (new - shift) / scale
    inverse   old = scale*new + shift

Where a scale is 0 nothing of the original is left, and nothing reads it: such elements are left out. What only a norm
that goes has read is compared with the output of that norm, whose place the layer has taken.

The models run one after the other. Of each activation a sample of its elements is kept, so that memory does not grow
with the number of layers.

Where steps change the structure, layers are those of the model behind them that have a counterpart in the original
(:mod:`bnfuse.reporting.counterparts`): all others do the work of several, and are left out.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.capture.recorder import Watcher
from bnfuse.capture.run import Recording
from bnfuse.graph.graph import Node, Value
from bnfuse.model.calls import Call
from bnfuse.planner.problem import Problem
from bnfuse.reporting.dataflow import Dataflow
from bnfuse.rules import RULES
from bnfuse.rules.layers import LAYERS, layer_of
from bnfuse.solve.search import Removal, Solution
from bnfuse.units import Unit
from bnfuse.verify.float64 import InFloat64, float64_copy, to_float64
from bnfuse.verify.measure import compare_outputs

_SAMPLED = 1 << 24
"""So many numbers of all activations together are kept, evenly among the layers."""

_MOST, _FEWEST = 1 << 16, 1 << 10
"""The largest and the smallest sample of one activation."""

_SORTED = 1 << 14
"""So many elements at most are sorted for quantiles."""

_WIDEST = 1 << 29
"""A larger model, in parameters, is not copied in float64."""

_QUANTILES = {"q01": 0.01, "q25": 0.25, "median": 0.5, "q75": 0.75, "q99": 0.99}

Place = tuple[str | None, str, int]
"""An operator as another model of the same structure has it: the module that ran it, its name, and which of these it
was in the run."""


@dataclass(eq=False)
class Layer:
    """One layer, or norm that stays; or the sum of a layer and a norm.

    Attributes:
        step: the number of its box.
        module: its name.
        place: where it runs in the fused model.
        original: where it runs in the original.
        value: what it gives in the original run.
        counterpart: what is compared with that of the fused model: what it gives, or what a norm made of that.
        source: where the counterpart is made; None if nothing is to be compared.
        units: the changes of units of the counterpart, in their order.
        axis: of the channels of its output.
        ranges: what was found of the weight and the activation, "before" and "after".
        relative: the difference of original and fused, rounding: the error of the original; None if not known.
    """

    step: int
    module: str
    place: Place
    original: Place
    value: Value
    counterpart: Value
    source: Place | None
    units: tuple[Unit, ...]
    axis: int
    ranges: dict[str, dict[str, dict[str, float] | None]] = field(
        default_factory=lambda: {part: {"before": None, "after": None} for part in ("weight", "activation")}
    )
    relative: float | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class Measured:
    """What runs of the models have shown.

    Attributes:
        layers: in the order of the run.
        rounding: relative L2 error of the original's outputs against float64, the largest; None if not known.
    """

    layers: list[Layer]
    rounding: float | None

    def errors(self) -> list[dict[str, Any]]:
        """Where error arises, in the order of the run."""
        return [
            {"module": layer.module, "node": layer.step, "relative": layer.relative, "rounding": layer.rounding}
            for layer in self.layers
            if layer.relative is not None
        ]

    def ranges(self) -> list[dict[str, Any]]:
        """Which numbers occur."""
        return [
            {"module": layer.module, "node": layer.step, **layer.ranges}
            for layer in self.layers
            if any(found is not None for part in layer.ranges.values() for found in part.values())
        ]


@dataclass(frozen=True)
class Origin:
    """The original of a restructured model.

    Attributes:
        dataflow: its run.
        nodes: its operators, all of them.
        counterparts: those of them that an operator of the restructured model is.
    """

    dataflow: Dataflow
    nodes: Sequence[Node]
    counterparts: Mapping[Node, Node]


def measured(
    problem: Problem,
    dataflow: Dataflow,
    solution: Solution | None,
    original: nn.Module,
    fused: nn.Module | None,
    origin: Origin | None = None,
) -> Measured:
    """Run the models on the first call, and look at every layer.

    Args:
        problem, dataflow: of the model that norms were taken from, behind all steps.
        solution: of the plan that was carried out; None if it is not known, then nothing is compared.
        fused: None if nothing was fused.
        origin: where the problem is not that of the original.
    """
    layers = (
        _layers(problem, dataflow, solution) if origin is None else _restructured(problem, dataflow, solution, origin)
    )
    most = max(_FEWEST, min(_MOST, _SAMPLED // max(len(layers), 1)))

    def sample_of(value: Value) -> Sample:
        return _sample(value.shape, most)

    call = problem.main.call
    kept: dict[Place, Tensor] = {}
    by_place = {layer.place: layer for layer in layers}
    by_original = {layer.original: layer for layer in layers}
    by_source: dict[Place, list[Layer]] = {}
    for layer in layers:
        if layer.source is not None and fused is not None:
            by_source.setdefault(layer.source, []).append(layer)

    def look_at_original(place: Place, node: Node, tensor: Tensor, made: _Made) -> None:
        if place in by_source and _fits(tensor, by_source[place][0].counterpart):
            kept[place] = sample_of(by_source[place][0].counterpart).of(tensor)
        if place in by_original:
            _note(by_original[place], "before", node, tensor, made)

    def look_at_exact(place: Place, node: Node, tensor: Tensor, made: _Made) -> None:
        for layer in by_source[place]:
            if place in kept and _fits(tensor, layer.counterpart):
                sample = sample_of(layer.counterpart)
                there = alive(layer.units, sample, kept[place].numel())
                layer.rounding = relative_error(sample.of(tensor)[there], kept[place][there])

    def look_at_fused(place: Place, node: Node, tensor: Tensor, made: _Made) -> None:
        layer = by_place[place]
        _note(layer, "after", node, tensor, made)
        if layer.source in kept and _fits(tensor, layer.counterpart):
            sample = sample_of(layer.counterpart)
            original = kept[layer.source]
            there = alive(layer.units, sample, original.numel())
            layer.relative = relative_error(original[there], undone(sample.of(tensor), layer.units, sample)[there])

    rounding = None
    output = _watched(original, call, _Watch({*by_original, *by_source}, look_at_original))
    if fused is not None and sum(parameter.numel() for parameter in original.parameters()) <= _WIDEST:
        with contextlib.suppress(Exception):  # whatever a model raises that cannot run in float64
            exact = float64_copy(original)
            wide = _watched(exact, call.map(to_float64), _Watch(by_source, look_at_exact), InFloat64())
            found = [one.relative_l2 for one in compare_outputs(wide, output).outputs if not one.exact]
            rounding = max(found, default=None)
            del exact, wide
    if fused is not None:
        _watched(fused, call, _Watch(by_place, look_at_fused))
    return Measured(layers, rounding)


def looked_at(dataflow: Dataflow) -> list[int]:
    """The boxes of the layers that make floating numbers."""
    return [
        step
        for node, step in dataflow.steps.items()
        if dataflow.kind(node) == "layer" and node.outputs and node.outputs[0].dtype.is_floating_point
    ]


def _layers(problem: Problem, dataflow: Dataflow, solution: Solution | None) -> list[Layer]:
    """The layers of the first call that make floating numbers, the norms that stay, and the sums behind layers that
    have taken up a norm beside them."""
    places = _places_of(problem.main.nodes)
    removals = () if solution is None else solution.removals
    gone = {node for removal in removals for site in removal.norm.sites for node in site.nodes}
    behind = {site.x: site.y for removal in removals for site in removal.norm.sites}
    changed, sums = _beside(removals)
    staying = {nodes[-1] for nodes in dataflow.norm_steps if nodes and nodes[-1] not in dataflow.removed}
    found = []
    for node, step in dataflow.steps.items():
        looked_at = dataflow.kind(node) == "layer" or node in staying or node in sums
        if not looked_at or not node.outputs or not node.outputs[0].dtype.is_floating_point:
            continue
        value = counterpart = node.outputs[0]
        while counterpart.pinned is None and counterpart.consumers and gone.issuperset(counterpart.consumers):
            after = behind.get(counterpart)
            if after is None:
                break
            counterpart = after
        maker = node if counterpart is value else counterpart.producer
        source = None if solution is None or node in changed or maker is None else places.get(maker)
        units = tuple(removal.units[counterpart] for removal in removals if counterpart in removal.units)
        place = places[node]
        found.append(Layer(step, node.call.path or "", place, place, value, counterpart, source, units, _axis(node)))
    return found


def _restructured(problem: Problem, dataflow: Dataflow, solution: Solution | None, origin: Origin) -> list[Layer]:
    """The layers that have a counterpart in the original, as it has them, with those places for the source.

    Of sums there is none: where layers were merged, a sum may be of others than in the original.
    """
    nodes = {place: node for node, place in _places_of(problem.main.nodes).items()}
    places = _places_of(origin.nodes)
    found = []
    for layer in _layers(problem, dataflow, solution):
        node = origin.counterparts.get(nodes[layer.place])
        box = origin.dataflow.steps.get(node) if node is not None else None
        if node is None or box is None or origin.dataflow.kind(node) not in ("layer", "norm"):
            continue
        maker = origin.counterparts.get(nodes[layer.source]) if layer.source is not None else None
        layer.step, layer.module, layer.original = box, node.call.path or "", places[node]
        layer.source = None if maker is None else places[maker]
        found.append(layer)
    return found


def _beside(removals: Sequence[Removal]) -> tuple[set[Node], set[Node]]:
    """Where norms are taken up by layers beside them: the operators whose results are then others, and not in other
    units, from each layer and norm to the sum of both; and the sums, which are again the same."""
    changed: set[Node] = set()
    sums: set[Node] = set()
    for removal in removals:
        layers = {node for value in removal.edited for node in value.consumers} if removal.is_beside else set()
        for site in removal.norm.sites if layers else ():
            from_norm = _chain(site.nodes[-1])
            for layer in layers:
                from_layer = _chain(layer)
                there = next((node for node in from_layer if node in from_norm), None)
                if there is not None:
                    changed.update(from_layer[: from_layer.index(there)], from_norm[: from_norm.index(there)])
                    sums.add(there)
    return changed, sums - changed


def _chain(node: Node) -> list[Node]:
    """An operator and those behind it, as long as nothing else reads what they make."""
    found = [node]
    while len(found[-1].outputs) == 1 and len(found[-1].outputs[0].consumers) == 1:
        found.append(found[-1].outputs[0].consumers[0])
    return found


def _axis(node: Node) -> int:
    layer = layer_of(node) if node.operator in LAYERS else None
    return min(1, len(node.outputs[0].shape) - 1) if layer is None else layer.axis


# Watching runs ------------------------------------------------------------------------------------------------------


def _places_of(nodes: Iterable[Node]) -> dict[Node, Place]:
    """The place of each operator that can be found again in another run."""
    counts: Counter[tuple[str | None, str]] = Counter()
    found: dict[Node, Place] = {}
    for node in nodes:
        key = node.call.path, node.operator
        found[node] = (*key, counts[key])
        counts[key] += 1
    return found


_Made = Mapping[Value, dict[str, float] | None]
"""Which numbers occur in weights that are made during a run."""

_Look = Callable[[Place, Node, Tensor, _Made], None]


class _Watch:
    """Finds the wanted operators of a run, and looks at what they make."""

    def __init__(self, wanted: Iterable[Place], look: _Look) -> None:
        self._wanted, self._look = set(wanted), look
        self._counts: Counter[tuple[str | None, str]] = Counter()
        self._seen: list[tuple[int, tuple[str | None, str]]] = []
        self._made: dict[Value, dict[str, float] | None] = {}

    def __call__(self, node: Node, tensors: Sequence[Tensor]) -> None:
        while self._seen and self._seen[-1][0] >= node.index:  # what was recorded there has been taken back
            self._counts[self._seen.pop()[1]] -= 1
        key = node.call.path, node.operator
        place = (*key, self._counts[key])
        self._seen.append((node.index, key))
        self._counts[key] += 1
        if not tensors:
            return
        if place in self._wanted:
            self._look(place, node, tensors[0].detach(), self._made)
        elif node.outputs and node.outputs[0].independent and tensors[0].dim() > 1:
            self._made[node.outputs[0]] = numbers(tensors[0].detach(), 0)


def _watched(model: nn.Module, call: Call, watcher: Watcher, mode: AbstractContextManager[object] | None = None) -> Any:
    """Run a call, and return its output."""
    recording = Recording(model, RULES, watcher=watcher)
    try:
        with mode or contextlib.nullcontext():
            return recording.record(call)[0].output
    finally:
        recording.graph.release()


def _note(layer: Layer, when: str, node: Node, tensor: Tensor, made: _Made) -> None:
    """Note which numbers occur in the activation of a layer, and in its weight if it is one that multiplies."""
    layer.ranges["activation"][when] = numbers(tensor, layer.axis)
    parts = layer_of(node) if node.operator in LAYERS else None
    if parts is None:
        return
    if parts.w.tensor is None:
        layer.ranges["weight"][when] = made.get(parts.w)
    else:
        axis = 1 if parts.transposed else 0  # of the outputs
        layer.ranges["weight"][when] = numbers(parts.w.tensor.detach(), axis)


# Numbers ------------------------------------------------------------------------------------------------------------


def _fits(tensor: Tensor, value: Value) -> bool:
    return _is_plain(tensor) and tuple(tensor.shape) == value.shape


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


class Sample:
    """The same elements of every tensor of one shape: all of them, or a random choice.

    >>> Sample((2, 3), 6).of(torch.arange(6).reshape(2, 3))
    tensor([0, 1, 2, 3, 4, 5])

    Args:
        shape: of the tensors.
        most: so many elements at most.
    """

    def __init__(self, shape: tuple[int, ...], most: int) -> None:
        self._shape = shape
        self._places: tuple[Tensor, ...] | None = None
        count = math.prod(shape)
        if count > most:
            generator = torch.Generator(device="cpu").manual_seed(0)
            flat = torch.randint(count, (most,), generator=generator, device="cpu")
            self._places = tuple(torch.unravel_index(flat, shape))

    def of(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor: flat, a copy, on the CPU."""
        if self._places is None:
            return tensor.detach().to("cpu", copy=True).reshape(-1)
        return tensor.detach()[tuple(place.to(tensor.device) for place in self._places)].cpu()

    def of_part(self, part: Tensor) -> Tensor:
        """The elements that a scale or shift, which broadcasts against the tensor, has at these places."""
        if self._places is None:
            return part.expand(self._shape).reshape(-1)
        pairs = zip(self._places, part.shape, strict=True)
        return part[tuple(place if size > 1 else torch.zeros_like(place) for place, size in pairs)]


@functools.lru_cache(maxsize=16)
def _sample(shape: tuple[int, ...], most: int) -> Sample:
    return Sample(shape, most)


def undone(elements: Tensor, units: Sequence[Unit], sample: Sample) -> Tensor:
    """Elements of a fused activation in the units of the original, in float64.

    >>> unit = Unit(torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    >>> undone(torch.tensor([3.0, 4.0]), [unit], Sample((1, 2), 2))
    tensor([1., 1.], dtype=torch.float64)

    Args:
        elements: those of the sample.
        units: the changes of units of the tensor, in their order.
        sample: where the elements stand in the tensor.
    """
    elements = elements.double()
    for unit in reversed(units):
        scale = None if unit.scale is None else sample.of_part(unit.scale)
        shift = None if unit.shift is None else sample.of_part(unit.shift)
        if unit.inverse:
            elements = elements if scale is None else elements * scale
            elements = elements if shift is None else elements + shift
        else:
            elements = elements if shift is None else elements - shift
            elements = elements if scale is None else elements / scale.masked_fill(scale == 0, 1.0)
    return elements


def alive(units: Sequence[Unit], sample: Sample, count: int) -> Tensor:
    """Which of the elements of a sample can be had back: those that were not multiplied by 0."""
    found = torch.ones(count, dtype=torch.bool, device="cpu")
    for unit in units:
        if unit.scale is not None and not unit.inverse:
            found &= sample.of_part(unit.scale) != 0
    return found


def relative_error(reference: Tensor, other: Tensor) -> float | None:
    """``|other - reference| / |reference|`` in L2, over what is finite in both; None relative to 0.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.1
    """
    reference, other = reference.double(), other.double()
    both = reference.isfinite() & other.isfinite()
    if not bool(both.all()):
        reference, other = reference[both], other[both]
    size = float(reference.norm())
    return float((other - reference).norm()) / size if size else None


def numbers(tensor: Tensor, axis: int, most: int = _SORTED) -> dict[str, float] | None:
    """Which numbers a tensor holds: their ends, five quantiles, and how unlike its channels are.

    >>> numbers(torch.tensor([[1.0, -2.0], [3.0, 8.0]]), 0)["channel_spread"]
    1.6

    Args:
        tensor: of a floating dtype.
        axis: of the channels.
        most: quantiles are those of a sample of at most so many elements.

    Returns:
        Under "channel_spread" the largest magnitude in any channel over the median of the largest magnitudes of all
        channels, None where that is 0. None for a tensor without finite elements.
    """
    if not _is_plain(tensor) or not tensor.is_floating_point() or not tensor.numel():
        return None
    if not bool(tensor.isfinite().all()):
        tensor = tensor[tensor.isfinite()]
        axis = 0
        if not tensor.numel():
            return None
    smallest, largest = tensor.aminmax()
    elements = _sample(tuple(tensor.shape), most).of(tensor).double()
    quantiles = elements.quantile(torch.tensor(list(_QUANTILES.values()), dtype=torch.float64, device="cpu"))
    found: dict[str, Any] = {"minimum": float(smallest), "maximum": float(largest)}
    found.update(zip(_QUANTILES, quantiles.tolist(), strict=True))
    if tensor.dim():
        others = [other for other in range(tensor.dim()) if other != axis]
        magnitudes = tensor.abs().amax(others) if others else tensor.abs()
        middle = float(magnitudes.double().quantile(0.5))
        found["channel_spread"] = float(magnitudes.max()) / middle if middle else None
    return found
