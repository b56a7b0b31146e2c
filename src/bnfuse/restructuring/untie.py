"""Untying: a weight that serves several places with different norms behind them becomes one weight for each.

A head that is shared by several levels computes ``n_i(L(x_i))`` with one layer ``L`` and a norm ``n_i`` for each
level. Folding ``n_1`` into ``L`` would change what ``n_2`` reads. No code need change to give each level a layer of its
own: put a copy of ``L`` in the place of each norm, before the norm, and the identity in the place of ``L``. What runs
is the same,

    n_i(L(x_i))  =  (L_i then n_i)(identity(x_i)),

if ``n_i`` reads what ``L`` made, nobody else does, and every use of ``L`` has such a norm. Then ``n_i`` folds into
``L_i``. The price are the weights of all copies but one; the arithmetic stays the same.

Where one weight belongs to several modules, each with one norm behind it, each of them gets a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from bnfuse.analysis.norms import referenced_elsewhere
from bnfuse.capture.module_calls import has_hooks
from bnfuse.changes import Former, NewLayer, OwnTensor, Placement, Row, Source, Step, Unchanged
from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Kind, ModuleCall, Value
from bnfuse.graph.norms import Norm, Site
from bnfuse.model import tree
from bnfuse.planner.problem import Problem
from bnfuse.reasons import (
    LAYER_HAS_HOOK,
    LAYER_IS_OTHER,
    NORM_ALSO_ELSEWHERE,
    PARAMETERS_READ_ELSEWHERE,
    REFERENCED_ELSEWHERE,
    USE_WITHOUT_NORM,
    Reason,
)
from bnfuse.restructuring.kinds import UNTIE
from bnfuse.restructuring.layers import LAYER, NORM, settings_of


def untied(problem: Problem, plan: Callable[[], Plan]) -> tuple[list[Step], list[Unchanged]]:
    """Steps that untie shared layers behind which norms stay, and the shared layers for which there is none.

    Args:
        problem: the model.
        plan: makes the plan of fusing it as it is; asked for only if a layer is shared.
    """
    search = _Search(problem)
    if not any(map(search.is_shared, search.layers)):
        return [], []
    staying = [norm for norm, one in zip(problem.norms, plan().decisions, strict=True) if not one.fused]
    steps: list[Step] = []
    unchanged: list[Unchanged] = []
    done: set[int] = set()
    for norm in staying:
        layer = search.layer_before(norm)
        if layer is None or id(layer) in done or norm.obstacle is not None or norm in problem.kept:
            continue
        group = search.group(layer)
        done.update(map(id, group))
        if not search.is_shared(layer):
            continue
        found = search.step(group)
        if isinstance(found, Step):
            steps.append(found)
        else:
            unchanged.append(Unchanged(UNTIE, search.name(layer), found))
    return steps, unchanged


class _Search:
    """What is known of the layers of a model and the norms behind them."""

    def __init__(self, problem: Problem) -> None:
        self.model, self.graph = problem.model, problem.graph
        self._names: dict[int, list[str]] = {}
        self._calls: dict[int, list[ModuleCall]] = {}
        for name, module in tree.named_modules(problem.model):
            self._names.setdefault(id(module), []).append(name)
        for call in self.graph.calls:
            self._calls.setdefault(id(call.module), []).append(call)
        self._sites: dict[Value, tuple[Norm, Site]] = {}
        for norm in problem.norms:
            if norm.names and norm.obstacle is None and norm not in problem.kept:
                self._sites.update({site.x: (norm, site) for site in norm.sites})
        self._modules = {id(module): module for module in tree.modules(problem.model)}
        self._referenced = referenced_elsewhere(problem.model)
        self._leaves: dict[int, list[Value]] = {}
        for leaf in dict.fromkeys(self.graph.leaves.values()):
            for owner in self._owners(leaf):
                self._leaves.setdefault(id(owner), []).append(leaf)

    def name(self, module: nn.Module) -> str:
        return self._names[id(module)][0]

    def layer_before(self, norm: Norm) -> nn.Module | None:
        """The module of the model with parameters that makes what a norm reads, and whose call does nothing else."""
        for site in norm.sites:
            node = site.x.producer
            call = None if node is None else node.call
            if call is not None and call.outputs == [site.x] and self._leaves.get(id(call.module)):
                return call.module
        return None

    def group(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that have a parameter in common with a layer, itself first."""
        found = [layer]
        for module in found:
            for leaf in self._leaves.get(id(module), ()):
                found += [owner for owner in self._owners(leaf) if all(owner is not other for other in found)]
        return found

    @property
    def layers(self) -> list[nn.Module]:
        """The modules with parameters that ran."""
        return [self._modules[key] for key in self._leaves if key in self._calls]

    def is_shared(self, layer: nn.Module) -> bool:
        """Whether a layer has a weight in common with another, or different things stand behind its uses: norms, or
        none."""
        if len(self.group(layer)) > 1:
            return True
        made = [value for call in self._calls.get(id(layer), ()) for value in call.outputs]
        return len({self._sites[value][0] if value in self._sites else None for value in made}) > 1

    def norms_behind(self, layer: nn.Module) -> list[Norm]:
        """The different norms that read what a layer makes."""
        made = [value for call in self._calls.get(id(layer), ()) for value in call.outputs]
        return list(dict.fromkeys(self._sites[value][0] for value in made if value in self._sites))

    def step(self, group: Sequence[nn.Module]) -> Step | Reason:
        """What gives each norm behind a group of layers a weight of its own; or why not."""
        for layer in group:
            refused = self._refusal(layer)
            if refused is not None:
                return refused
        uses = [(layer, self.norms_behind(layer)) for layer in group]
        norms = [norm for _, behind in uses for norm in behind]
        shared = next((norm for norm in norms if norms.count(norm) > 1), None)
        if shared is not None:
            return NORM_ALSO_ELSEWHERE.reason(norm=shared.label)
        placements: list[Placement] = []
        tensors: list[OwnTensor] = []
        held: set[int] = set()  # the tensors that stay where they are
        copies = 0
        for layer, behind in uses:
            copies += len(behind)
            if len(behind) > 1:
                placements += self._placements(layer, behind)
                continue
            for place, tensor in layer.named_parameters():
                if id(tensor) in held:
                    names = tuple(f"{name}.{place}" for name in self._names[id(layer)])
                    tensors.append(OwnTensor(names, tuple(tensor.shape), Source(names[0])))
            held.update(map(id, layer.parameters()))
        where = "in the places of the norms behind it" if placements else "of its weight, one for each module"
        return Step(
            kind=UNTIE,
            subject=self.name(group[0]),
            what=f"{copies} copies {where}",
            placements=tuple(placements),
            tensors=tuple(tensors),
            norms=tuple(norm.names[0] for norm in norms),
        )

    def _refusal(self, layer: nn.Module) -> Reason | None:
        """Why a layer cannot be moved behind each of its uses."""
        names, calls = self._names[id(layer)], self._calls.get(id(layer), [])
        if "" in names or settings_of(layer) is None or not all(call.is_standard and call.plain for call in calls):
            return LAYER_IS_OTHER.reason(kind=type(layer).__name__)
        if has_hooks(layer):
            return LAYER_HAS_HOOK.reason()
        if id(layer) in self._referenced:
            return REFERENCED_ELSEWHERE.reason(place=self._referenced[id(layer)])
        own = {node for call in calls for node in call.all_nodes}
        owners = {id(owner) for leaf in self._leaves[id(layer)] for owner in self._owners(leaf)}
        for leaf in self._leaves[id(layer)]:
            if leaf.kind is not Kind.PARAMETER or leaf.pinned is not None:
                return leaf.pinned or LAYER_IS_OTHER.reason(kind=type(layer).__name__)
            for node in leaf.consumers:
                if node not in own and id(node.call.module) not in owners:
                    return PARAMETERS_READ_ELSEWHERE.reason(reader=node)
        if not calls:
            return USE_WITHOUT_NORM.reason(place=names[0])
        inside = {id(value) for call in calls for value in call.outputs}
        for call in calls:
            if len(call.inputs) != 1 or len(call.outputs) != 1:
                return LAYER_IS_OTHER.reason(kind=type(layer).__name__)
            value = call.outputs[0]
            norm, site = self._sites.get(value, (None, None))
            if norm is None or site is None:
                return USE_WITHOUT_NORM.reason(place=_place_of(value))
            if value.pinned is not None:
                return value.pinned
            if any(reader not in site.nodes for reader in value.consumers):
                other = next(reader for reader in value.consumers if reader not in site.nodes)
                return USE_WITHOUT_NORM.reason(place=other)
            if any(id(site.x) not in inside for site in norm.sites):
                return NORM_ALSO_ELSEWHERE.reason(norm=norm.label)
        return None

    def _placements(self, layer: nn.Module, norms: Sequence[Norm]) -> Iterator[Placement]:
        settings = settings_of(layer)
        assert settings is not None
        kind, arguments = settings
        first = self.name(layer)
        copy = NewLayer(kind, arguments, {place: Source(f"{first}.{place}") for place, _ in layer.named_parameters()})
        for norm in norms:
            yield Placement(norm.names, Row(((LAYER, copy), (NORM, Former()))))
        yield Placement(tuple(self._names[id(layer)]), NewLayer("Identity"))

    def _owners(self, leaf: Value) -> list[nn.Module]:
        """The modules that hold a parameter."""
        owners = (self.model.get_submodule(name.rpartition(".")[0]) for name in leaf.names)
        return list({id(owner): owner for owner in owners}.values())


def _place_of(value: Value) -> str:
    """Where something is read, for a message."""
    if value.consumers:
        return str(value.consumers[0])
    return "an output of the model"
