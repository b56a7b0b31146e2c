"""Untying: a weight that serves several places with different norms around them becomes one weight for each.

A head that is shared by several levels computes ``n_i(L(x_i))`` with one layer ``L`` and a norm ``n_i`` for each
level. Folding ``n_1`` into ``L`` would change what ``n_2`` reads. No code need change to give each level a layer of its
own: put a copy of ``L`` in the place of each norm, before the norm, and the identity in the place of ``L``. What runs
is the same,

    n_i(L(x_i))  =  (L_i then n_i)(identity(x_i)),

if ``n_i`` reads what ``L`` made, nobody else does, and every use of ``L`` has such a norm. Then ``n_i`` folds into
``L_i``. Norms before a shared layer are the mirror image: ``L(n_i(x_i)) = identity((n_i then L_i)(x_i))``, if ``L``
alone reads what ``n_i`` made. The price are the weights of all copies but one; the arithmetic stays the same.

Where one weight belongs to several modules, no module need move: each of them gets a parameter of its own, if each
reads the weight under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bnfuse.analysis.norms import referenced_elsewhere
from bnfuse.capture.module_calls import has_hooks
from bnfuse.changes import Decision, Former, NewLayer, OwnTensor, Placement, Row, Source, Step, Unchanged
from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Kind, ModuleCall, Value
from bnfuse.graph.norms import Norm, Site
from bnfuse.model import tree
from bnfuse.planner.problem import Problem
from bnfuse.reasons import (
    LAYER_HAS_HOOK,
    LAYER_IS_OTHER,
    MODULE_DID_NOT_RUN,
    NORM_ALSO_ELSEWHERE,
    PARAMETERS_READ_ELSEWHERE,
    REFERENCED_ELSEWHERE,
    SHARED_WEIGHT,
    USE_WITHOUT_NORM,
    Reason,
)
from bnfuse.restructuring.kinds import UNTIE
from bnfuse.restructuring.layers import LAYER, NORM, settings_of


def untied(problem: Problem, plan: Callable[[], Plan]) -> tuple[list[Step], list[Unchanged]]:
    """Steps that untie shared weights for which norms stay, and the shared weights for which there is none.

    Args:
        problem: the model.
        plan: makes the plan of fusing it as it is; asked for only if a weight is shared.
    """
    search = _Search(problem)
    if not search.anything_shared:
        return [], []
    staying = {
        norm: decision
        for norm, decision in zip(problem.norms, plan().decisions, strict=True)
        if not decision.fused and norm.obstacle is None and norm not in problem.kept
    }
    found = [*search.tied_weights(staying), *search.shared_layers(list(staying))]
    steps = [one for one in found if isinstance(one, Step)]
    return steps, [one for one in found if isinstance(one, Unchanged)]


@dataclass(frozen=True)
class _Side:
    """Where the norms of a layer stand.

    Attributes:
        sites: the norms, and the places where they are applied, by the value between them and the layer.
        behind: whether the norm comes after the layer.
    """

    sites: dict[Value, tuple[Norm, Site]]
    behind: bool

    @property
    def name(self) -> str:
        return "behind" if self.behind else "before"

    def values(self, calls: Sequence[ModuleCall]) -> list[Value]:
        """What a layer hands over to a norm or gets from one, in each of its calls."""
        return [value for call in calls for value in (call.outputs if self.behind else call.inputs)[:1]]

    def of(self, site: Site) -> Value:
        """The value between a norm and a layer on this side."""
        return site.x if self.behind else site.y


class _Search:
    """What is known of the layers of a model and the norms around them."""

    def __init__(self, problem: Problem) -> None:
        self.model, self.graph = problem.model, problem.graph
        self._names: dict[int, list[str]] = {}
        self._calls: dict[int, list[ModuleCall]] = {}
        for name, module in tree.named_modules(problem.model):
            self._names.setdefault(id(module), []).append(name)
        for call in self.graph.calls:
            self._calls.setdefault(id(call.module), []).append(call)
        able = [norm for norm in problem.norms if norm.names and norm.obstacle is None and norm not in problem.kept]
        self._sides = (
            _Side({site.x: (norm, site) for norm in able for site in norm.sites}, behind=True),
            _Side({site.y: (norm, site) for norm in able if not norm.keep for site in norm.sites}, behind=False),
        )
        self._referenced = referenced_elsewhere(problem.model)
        self._owners: dict[Value, list[nn.Module]] = {}
        self._leaves: dict[int, list[Value]] = {}
        for leaf in dict.fromkeys(self.graph.leaves.values()):
            holders = (self.model.get_submodule(name.rpartition(".")[0]) for name in leaf.names)
            self._owners[leaf] = list({id(owner): owner for owner in holders}.values())
            for owner in self._owners[leaf]:
                self._leaves.setdefault(id(owner), []).append(leaf)

    @property
    def anything_shared(self) -> bool:
        """Whether some weight has several owners, or a layer different norms around its uses."""
        if any(len(owners) > 1 for owners in self._owners.values()):
            return True
        layers = (owners[0] for owners in self._owners.values())
        return any(self._has_different_uses(layer, side) for layer in layers for side in self._sides)

    # A weight with several owners ------------------------------------------------------------------------------------

    def tied_weights(self, staying: dict[Norm, Decision]) -> Iterator[Step | Unchanged]:
        """What becomes of the weights with several owners for which norms stay."""
        for leaf, owners in self._owners.items():
            if len(owners) < 2:
                continue
            norms = [norm for norm, decision in staying.items() if any(_is_about(leaf, it) for it in decision.reasons)]
            if not norms:
                continue
            refused = self._reader_without_a_name(leaf, owners)
            if refused is not None:
                yield Unchanged(UNTIE, leaf.names[0], refused)
                continue
            idle = [owner for owner in owners if id(owner) not in self._calls]
            first = (idle or owners)[0]  # the others leave it what it has
            rest = [owner for owner in owners if owner is not first and owner not in idle]
            tensors = []
            for owner in rest:
                names = tuple(name for name in leaf.names if self.model.get_submodule(name.rpartition(".")[0]) is owner)
                tensors.append(OwnTensor(names, leaf.shape, Source(names[0])))
            yield Step(
                kind=UNTIE,
                subject=leaf.names[0],
                what=f"{len(owners)} weights, one for each of its modules",
                tensors=tuple(tensors),
                norms=tuple(norm.names[0] for norm in norms),
            )

    def _reader_without_a_name(self, leaf: Value, owners: Sequence[nn.Module]) -> Reason | None:
        """Why the owners of a weight cannot each have their own: somebody else reads it, under whichever name."""
        if leaf.kind is not Kind.PARAMETER:
            return LAYER_IS_OTHER.reason(kind=type(owners[0]).__name__)
        if leaf.pinned is not None and leaf.pinned.code != MODULE_DID_NOT_RUN.code:
            return leaf.pinned
        inside = {node for owner in owners for call in self._calls.get(id(owner), ()) for node in call.all_nodes}
        reader = next((node for node in leaf.consumers if node not in inside), None)
        return None if reader is None else PARAMETERS_READ_ELSEWHERE.reason(reader=reader)

    # A layer with several uses ---------------------------------------------------------------------------------------

    def shared_layers(self, staying: Sequence[Norm]) -> Iterator[Step | Unchanged]:
        """What becomes of the layers with different norms around their uses, some of which stay."""
        done: dict[int, Unchanged | None] = {}
        for side in self._sides:
            for norm in staying:
                layer = self._layer_at(norm, side)
                if layer is None or done.get(id(layer), layer) is None or not self._has_different_uses(layer, side):
                    continue
                refused = self._refusal(layer, side)
                if refused is None:
                    done[id(layer)] = None
                    yield self._step(layer, side)
                else:
                    done.setdefault(id(layer), Unchanged(UNTIE, self._names[id(layer)][0], refused))
        yield from filter(None, done.values())

    def _layer_at(self, norm: Norm, side: _Side) -> nn.Module | None:
        """The module of the model with parameters of one owner that makes what a norm reads, or reads what it makes."""
        for site in norm.sites:
            value = side.of(site)
            nodes = ([] if value.producer is None else [value.producer]) if side.behind else value.consumers
            for call in (node.call for node in nodes):
                leaves = self._leaves.get(id(call.module), ())
                if leaves and side.values([call]) == [value] and all(len(self._owners[leaf]) == 1 for leaf in leaves):
                    return call.module
        return None

    def _has_different_uses(self, layer: nn.Module, side: _Side) -> bool:
        """Whether different norms stand on one side of the uses of a layer, or one and none."""
        values = side.values(self._calls.get(id(layer), ()))
        return len({side.sites[value][0] if value in side.sites else None for value in values}) > 1

    def _refusal(self, layer: nn.Module, side: _Side) -> Reason | None:
        """Why a layer cannot be put in the places of the norms on one side of it."""
        calls, kind = self._calls[id(layer)], type(layer).__name__
        names = self._names.get(id(layer), [""])
        if "" in names or settings_of(layer) is None or not all(call.is_standard and call.plain for call in calls):
            return LAYER_IS_OTHER.reason(kind=kind)
        if has_hooks(layer):
            return LAYER_HAS_HOOK.reason()
        if id(layer) in self._referenced:
            return REFERENCED_ELSEWHERE.reason(place=self._referenced[id(layer)])
        own = {node for call in calls for node in call.all_nodes}
        for leaf in self._leaves[id(layer)]:
            if leaf.kind is not Kind.PARAMETER or leaf.pinned is not None:
                return leaf.pinned or LAYER_IS_OTHER.reason(kind=kind)
            reader = next((node for node in leaf.consumers if node not in own), None)
            if reader is not None:
                return PARAMETERS_READ_ELSEWHERE.reason(reader=reader)
        values = side.values(calls)
        if any(len(call.inputs) != 1 or len(call.outputs) != 1 for call in calls):
            return LAYER_IS_OTHER.reason(kind=kind)
        for value in values:
            norm, site = side.sites.get(value, (None, None))
            if norm is None or site is None:
                return USE_WITHOUT_NORM.reason(side=side.name, place=_place_of(value, side))
            if value.pinned is not None:
                return value.pinned
            readers = site.nodes if side.behind else own
            other = next((reader for reader in value.consumers if reader not in readers), None)
            if other is not None:
                return USE_WITHOUT_NORM.reason(side=side.name, place=other)
            if any(side.of(site) not in values for site in norm.sites):
                return NORM_ALSO_ELSEWHERE.reason(norm=norm.label)
        return None

    def _step(self, layer: nn.Module, side: _Side) -> Step:
        settings = settings_of(layer)
        assert settings is not None
        kind, arguments = settings
        names = self._names[id(layer)]
        norms = list(dict.fromkeys(side.sites[value][0] for value in side.values(self._calls[id(layer)])))
        sources = {place: Source(f"{names[0]}.{place}") for place, _ in layer.named_parameters()}
        copy, norm = (LAYER, NewLayer(kind, arguments, sources)), (NORM, Former())
        row = Row((copy, norm) if side.behind else (norm, copy))
        return Step(
            kind=UNTIE,
            subject=names[0],
            what=f"{len(norms)} copies in the places of the norms {side.name} it",
            placements=(*(Placement(norm.names, row) for norm in norms), Placement(tuple(names), NewLayer("Identity"))),
            norms=tuple(norm.names[0] for norm in norms),
        )


def _is_about(leaf: Value, reason: Reason) -> bool:
    """Whether a norm stays since a weight is shared."""
    if reason.code == SHARED_WEIGHT.code:
        return any(reason.text.startswith(f"{name} ") for name in leaf.names)
    return reason.code == MODULE_DID_NOT_RUN.code and leaf.pinned is not None and leaf.pinned.code == reason.code


def _place_of(value: Value, side: _Side) -> str:
    """What is on the other side of a value, for a message."""
    node = (value.consumers[0] if value.consumers else None) if side.behind else value.producer
    return str(node) if node is not None else f"an {'output' if side.behind else 'input'} of the model"
