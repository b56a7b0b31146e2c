"""Deciding which norms go: one norm after the other, each in every way that there is.

Removing a norm starts with one demand: the tensor before it takes its units (fold backward), or the tensor after it
does (fold forward), and a trial finds out what follows from that (:mod:`bnfuse.solve.propagation`). A norm beside a
layer may be taken up by that, without a demand (:mod:`bnfuse.solve.parallel_layer`). What is accepted stays: the next
norm is tried on the network as it would then be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bnfuse.changes import Changes, Decision, Edit, Replacement
from bnfuse.graph.graph import Graph, Kind, Node, Value
from bnfuse.graph.norms import Norm, Site
from bnfuse.reasons import (
    APPLIED_TO_OWN_OUTPUT,
    MEAN_TOO_FAR_FOR_NEXT_LAYER,
    NORM_NOT_FINITE,
    OTHER_LAYOUT,
    OVERWRITES,
    UNDOES_ZERO_SCALE,
    Reason,
)
from bnfuse.rules import ABSORBERS
from bnfuse.rules.norm_statistics import FARTHEST
from bnfuse.solve import parallel_layer
from bnfuse.solve.checks import agree
from bnfuse.solve.network import Network, Refusal
from bnfuse.solve.propagation import TooFarError, Trial
from bnfuse.units import IDENTITY, NotInvertibleError, Unit, reciprocal

_BOTH = "both"
"""The direction of a norm whose scale goes one way and whose shift the other."""

_BESIDE = "beside"
"""The direction of a norm that a layer beside it takes up."""

_NEARBY = (6, 24)
"""Operators that the first rounds of attempts look at."""


def solve(
    graph: Graph,
    norms: Sequence[Norm],
    kept: Mapping[Norm, Reason],
    varying: Collection[Node] = (),
    forbidden: Collection[nn.Module] = (),
    last: Container[Norm] = (),
) -> Solution:
    """Decide for every norm, and collect the edits.

    Args:
        graph: what one run did.
        norms: the norms of the model.
        kept: norms that the caller wants to keep, with the reason.
        varying: operators whose numbers are others in another call.
        forbidden: modules that cannot be kept from working in place.
        last: norms that are to cost none of the others.

    Returns:
        The decisions, and the changes that follow from them.
    """
    steps = {node for norm in norms for site in norm.sites for node in site.nodes}
    network = Network(graph, varying, forbidden, steps)
    decisions: dict[Norm, Decision] = {}
    replacements, removals = [], []
    for norm in sorted(norms, key=lambda norm: (norm in last, *_order(norm))):
        obstacle = norm.obstacle or kept.get(norm)
        found = _stay(norm, (obstacle,)) if obstacle else _attempt(network, norm)
        decisions[norm] = found.decision if isinstance(found, Removal) else found
        if isinstance(found, Removal):
            replacements.append(Replacement(norm.names, norm.keep))
            removals.append(found)
    gone = tuple(f"{name}." for it in replacements for name in it.names)
    staying = tuple(
        f"{name}.{child}.".replace("..", ".") for it in replacements for name in it.names for child in it.keep
    )
    edits = tuple(
        Edit(value.names, value.shape, tuple(factors), value.kind is Kind.ABSENT, value.handler)
        for value, factors in network.edits.items()
        # A norm may be edited before it goes itself.
        if value.handler is not None
        or not all(name.startswith(gone) and not name.startswith(staying) for name in value.names)
    )
    changes = Changes(edits=edits, replacements=tuple(replacements))
    in_order = tuple(decisions[norm] for norm in norms)
    return Solution(in_order, changes, tuple(network.memory.switched), tuple(removals))


@dataclass(frozen=True, eq=False)
class Removal:
    """A norm that goes, and what that takes.

    Attributes:
        norm: the norm.
        decision: what is said of it.
        units: the change of units of every value that gets one, on top of those of earlier removals.
        edited: the parameters that take the norm up.
    """

    norm: Norm
    decision: Decision
    units: Mapping[Value, Unit]
    edited: tuple[Value, ...]

    @property
    def is_beside(self) -> bool:
        """True if a layer beside the norm takes it up: what that makes is not the same in other units."""
        return self.decision.direction == _BESIDE


@dataclass(frozen=True)
class Solution:
    """Which norms go, and how.

    Attributes:
        decisions: one for each norm, in the order of the norms.
        changes: what is written to the model.
        out_of_place: modules that work in place and are to stop, whose callers have to use what they return.
        removals: the norms that go, in the order in which that was settled.
    """

    decisions: tuple[Decision, ...]
    changes: Changes
    out_of_place: tuple[nn.Module, ...]
    removals: tuple[Removal, ...]


def _order(norm: Norm) -> tuple[bool, int]:
    """Norms behind a producer that feeds only them come first; the rest by size, since they may compete."""
    alone = all(
        (maker := site.x.producer) is not None and maker.operator in ABSORBERS and len(site.x.consumers) == 1
        for site in norm.sites
    )
    return (not alone, -norm.elements)


def _stay(norm: Norm, reasons: tuple[Reason, ...]) -> Decision:
    return Decision(norm.label, norm.kind, norm.channels, False, reasons=reasons)


def _attempt(network: Network, norm: Norm) -> Decision | Removal:
    """Try every way; what can be settled nearby comes first, since it touches nothing else."""
    reasons: dict[str, Reason] = {}
    targets = [node for site in norm.sites for node in site.nodes]
    ways: Iterable[tuple[_Way, Trial]] = ((way, Trial(network, targets)) for way in _ways(network, norm))
    for limit in (*_NEARBY, None):
        too_far = []
        for way, trial in ways:
            try:
                if limit == _NEARBY[0]:
                    way.start(trial, limit)
                else:
                    trial.go_on(limit)
                _check_memory(network, norm)
            except TooFarError:
                too_far.append((way, trial))
                continue
            except Refusal as refusal:
                if way.direction != _BOTH:
                    reasons.setdefault(way.direction, replace(refusal.reason, direction=way.direction))
                continue
            trial.accept()
            into = dict.fromkeys(_layer_name(value) for value in trial.edits)
            decision = Decision(norm.label, norm.kind, norm.channels, True, way.direction, tuple(into))
            units = {value: unit for value, unit in trial.units.items() if not unit.is_identity}
            return Removal(norm, decision, units, tuple(trial.edits))
        ways = too_far
    return _stay(norm, tuple(reasons[way] for way in ("backward", "forward", _BESIDE) if way in reasons))


def _layer_name(value: Value) -> str:
    name = value.names[0]
    return name if value.kind is Kind.LAYER else name.rpartition(".")[0] or name


def _check_memory(network: Network, norm: Norm) -> None:
    """Let the input and the output of the norm share their memory, if nothing that is still read is overwritten."""
    memory = network.memory
    switches = []
    for writer, value in memory.conflicts(norm.sites):
        if not memory.can_switch(writer):
            reader = next((node for node in value.consumers if node.index > writer.index), None)
            raise Refusal(OVERWRITES.reason(*writer.place, reader=reader or "the caller"), scale=True)
        switches.append(writer.call.module)
    obstacle = network.layouts.obstacle(norm.sites)
    if obstacle is not None:
        raise Refusal(OTHER_LAYOUT.reason(*obstacle.place), scale=True)
    switches += [writer.call.module for writer in memory.training_conflicts(norm.sites) if memory.can_switch(writer)]
    memory.switched.update(dict.fromkeys(switches))
    memory.merge(norm.sites)


@dataclass(frozen=True)
class _Way:
    """One way to remove a norm.

    Attributes:
        start: begins a trial, of so many operators.
    """

    direction: str
    start: Callable[[Trial, int], None]


def _ways(network: Network, norm: Norm) -> Iterator[_Way]:
    """What to try, in turn: a layer beside the norm takes it up, which changes no units; all of ``a*x + c`` goes back,
    or on; or the scale goes one way and the shift the other."""
    maps = _Maps(network, norm)
    for layers in zip(*(parallel_layer.siblings(site, network.removed) for site in norm.sites), strict=False):
        if len({layer.node for layer in layers}) == len(layers):  # none twice

            def run(trial: Trial, limit: int, layers: tuple[parallel_layer.Sibling, ...] = layers) -> None:
                sites = zip(layers, maps.known, strict=True)
                trial.run_beside([(layer, site, a, c) for layer, (site, a, c, _) in sites])

            yield _Way(_BESIDE, run)
    yield _Way("backward", lambda trial, limit: trial.run(maps.demands("backward", "backward"), limit))
    yield _Way("forward", lambda trial, limit: trial.run(maps.demands("forward", "forward"), limit))
    yield _Way(_BOTH, lambda trial, limit: trial.run(maps.demands("backward", "forward"), limit))
    yield _Way(_BOTH, lambda trial, limit: trial.run(maps.demands("forward", "backward"), limit))


class _Maps:
    """What a norm does at its sites, and the units that are demanded to begin with."""

    def __init__(self, network: Network, norm: Norm) -> None:
        self.network, self.norm = network, norm

    @functools.cached_property
    def known(self) -> list[tuple[Site, Tensor, Tensor, Unit]]:
        """``a*x + c`` at each site, and as a unit."""
        made = []
        for site in self.norm.sites:
            a, c, unit = self.network.affine(site.nodes)
            if unit is None:
                raise Refusal(NORM_NOT_FINITE.reason(None, self.norm.label), True)
            made.append((site, a, c, unit))
        return made

    def demands(self, scale: str, shift: str) -> dict[Value, Unit]:
        """The units of the input and the output of each site, by where scale and shift go."""
        result: dict[Value, Unit] = {}
        for site, a, c, unit in self.known:
            if shift == "forward":
                self._check_means(site)
            whole = scale == shift
            if scale == "backward":
                units = (unit, IDENTITY) if whole else (Unit(unit.scale), _inverse(None, unit.shift))
            elif whole:
                units = (IDENTITY, _inverse(unit.scale, unit.shift))
            else:  # a*x + c = a*(x + c/a)
                units = (Unit.of(None, c * self._reciprocal(a)), _inverse(unit.scale, None))
            for value, demand in zip((site.x, site.y), units, strict=True):
                if value in result and not agree(result[value], demand):
                    raise Refusal(APPLIED_TO_OWN_OUTPUT.reason(None, self.norm.label), True)
                result[value] = demand
        return result

    def _check_means(self, site: Site) -> None:
        """A shift that goes on takes the means along, which should not be too large for that."""
        far = max(self.network.offset(node) for node in site.nodes)
        if far > FARTHEST.get(site.x.dtype, 0.0):
            reason = MEAN_TOO_FAR_FOR_NEXT_LAYER.reason(None, self.norm.label, distance=far)
            raise Refusal(reason, True)

    def _reciprocal(self, scale: Tensor) -> Tensor:
        try:
            return reciprocal(scale)
        except NotInvertibleError:
            raise Refusal(UNDOES_ZERO_SCALE.reason(None, self.norm.label), True) from None


def _inverse(scale: Tensor | None, shift: Tensor | None) -> Unit:
    return IDENTITY if scale is None and shift is None else Unit(scale, shift, True)
