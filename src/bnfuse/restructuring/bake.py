"""Baking: a weight that is computed from parameters alone becomes its result.

Weight standardisation, weight and spectral norm, masks, products of factors, any parametrisation: what such a layer
convolves with depends on no input, so that in evaluation it is a constant. It is computed once, in float64, and rounded
once; a norm behind it then folds into it like into any weight.

* A tensor that a parametrisation of PyTorch's computes, or a hook of PyTorch's (old-style weight norm and spectral
  norm, pruning), becomes a parameter of the same layer, and what computed it is taken away.
* A module whose forward computes a weight and runs one layer with it becomes that layer of PyTorch's, with the result.
  Its own parameters go, so nobody else may read them.

Where the weight is computed amid other work, no module can be replaced: code stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnfuse.analysis.norms import referenced_elsewhere
from bnfuse.capture.module_calls import has_hooks
from bnfuse.changes import NewLayer, OwnTensor, Placement, Source, Step, Unchanged
from bnfuse.graph.graph import Kind, ModuleCall, Node
from bnfuse.model import tree
from bnfuse.model.placing import computed_tensors
from bnfuse.model.quantisation import is_watcher
from bnfuse.model.wrappers import HOOK_OF_ACCELERATE
from bnfuse.planner.problem import Problem
from bnfuse.reasons import (
    CONTENTS_DEPEND_ON_RUN,
    DID_NOT_RUN,
    IS_PREPARED,
    IS_SCRIPTED,
    IS_THE_MODEL,
    LAYER_DIFFERS,
    LAYER_HAS_HOOK,
    LAYER_NOT_NAMED,
    PARAMETERS_READ_ELSEWHERE,
    REFERENCED_ELSEWHERE,
    WEIGHT_COMPUTED_AMID_OTHER_WORK,
    Reason,
)
from bnfuse.restructuring.kinds import BAKE
from bnfuse.restructuring.layers import Run, layer_run
from bnfuse.rules.registry import FAMILIES, Family
from bnfuse.solve.network import Network, Refusal
from bnfuse.verify.float64 import InFloat64, float64_copy


def baked(problem: Problem) -> tuple[list[Step], list[Unchanged]]:
    """Steps that make computed weights parameters, and the modules with computed weights for which there is none."""
    search = _Search(problem)
    steps: list[Step] = []
    unchanged: list[Unchanged] = []
    for module, names in search.names.values():
        found: Step | Reason | None
        if computed_tensors(module):
            found = search.without_computation(module)
        else:
            found = search.as_layer(module)
        if isinstance(found, Step):
            steps.append(found)
        elif found is not None:
            unchanged.append(Unchanged(BAKE, names[0] or type(module).__name__, found))
    return steps, unchanged


class _Search:
    """What is known of the modules of a model that compute weights.

    Attributes:
        names: every module and its names, by its ``id``.
    """

    def __init__(self, problem: Problem) -> None:
        self.model, self.graph = problem.model, problem.graph
        self._network = Network(problem.graph, problem.varying)
        self.names: dict[int, tuple[nn.Module, list[str]]] = {}
        for name, module in tree.named_modules(problem.model):
            self.names.setdefault(id(module), (module, []))[1].append(name)
        self._calls: dict[int, list[ModuleCall]] = {}
        for call in self.graph.calls:
            self._calls.setdefault(id(call.module), []).append(call)
        self._referenced = referenced_elsewhere(problem.model)
        self._norms = problem.norms
        self._layers = None if problem.options.layers is None else tuple(problem.options.layers)

    def without_computation(self, module: nn.Module) -> Step | Reason | None:
        """What makes parameters of the tensors that parametrisations and hooks of PyTorch's compute."""
        names = self.names[id(module)][1]
        places = computed_tensors(module)
        refused = self._refusal(module)
        if refused is not None:
            return refused
        used = [name for name, _ in module.named_parameters() if any(_is_of(name, place) for place in places)]
        leaves = (self.graph.leaves.get(f"{names[0]}.{name}".lstrip(".")) for name in used)
        if not all(leaf is not None and leaf.consumers for leaf in leaves):
            return DID_NOT_RUN.reason()  # and nothing would tell that it has changed since
        try:
            contents = _computed(module, places)
        except Exception:  # noqa: BLE001 (whatever the code of a parametrisation raises)
            return CONTENTS_DEPEND_ON_RUN.reason()
        tensors = []
        for place, exact in contents.items():
            like = next(name for name, _ in module.named_parameters() if _is_of(name, place))
            full = tuple(f"{name}.{place}" if name else place for name in names)
            like = f"{names[0]}.{like}" if names[0] else like
            tensors.append(OwnTensor(full, tuple(exact.shape), Source(like, exact)))
        how = "parametrisation" if parametrize.is_parametrized(module) else "hook"
        return Step(
            kind=BAKE,
            subject=names[0] or type(module).__name__,
            what=f"the {' and '.join(places)} that a {how} computes",
            tensors=tuple(tensors),
        )

    def as_layer(self, module: nn.Module) -> Step | Reason | None:
        """What makes a layer of PyTorch's of a module that computes its weight; None if it computes none."""
        names, calls = self.names[id(module)][1], self._calls.get(id(module), [])
        runs = [run for call in calls if (run := _computing(call)) is not None]
        if not runs:
            return None
        if has_hooks(module) and not module._modules:
            return LAYER_HAS_HOOK.reason()
        if len(runs) < len(calls) or not all(map(_is_all, calls, runs)):
            return WEIGHT_COMPUTED_AMID_OTHER_WORK.reason() if any(map(_is_worth_a_word, runs)) else None
        if any((run.kind, run.settings) != (runs[0].kind, runs[0].settings) for run in runs):
            return LAYER_DIFFERS.reason()
        if "" in names:
            return IS_THE_MODEL.reason()
        refused = self._refusal(module)
        if refused is not None:
            return refused
        if has_hooks(module) or HOOK_OF_ACCELERATE in module.__dict__:
            return LAYER_HAS_HOOK.reason()
        if id(module) in self._referenced:
            return REFERENCED_ELSEWHERE.reason(place=self._referenced[id(module)])
        reader = self._other_reader(calls, tuple(f"{name}." for name in names))
        if reader is not None:
            return PARAMETERS_READ_ELSEWHERE.reason(reader=reader)
        try:
            contents = [{place: self._network.content(value) for place, value in run.tensors.items()} for run in runs]
        except Refusal as refusal:
            return refusal.reason
        first = contents[0]
        if any(not _same(first[place], other[place]) for other in contents for place in first):
            return LAYER_DIFFERS.reason()
        like = self._like(module, names[0], runs[0])
        if like is None:
            return None
        sources = {place: Source(like, runs[0].turned(place, exact)) for place, exact in first.items()}
        layer = NewLayer(runs[0].kind, runs[0].settings, sources)
        return Step(
            kind=BAKE,
            subject=names[0],
            what=f"the weight that {type(module).__name__} computes, in a {layer.kind}",
            placements=(Placement(tuple(names), layer),),
            norms=tuple(
                norm.names[0] for norm in self._norms if norm.names and norm.names[0].startswith(f"{names[0]}.")
            ),
        )

    def _refusal(self, module: nn.Module) -> Reason | None:
        """Why a module stays as it is, whatever it computes."""
        if isinstance(module, torch.jit.ScriptModule):
            return IS_SCRIPTED.reason()
        if any(map(is_watcher, tree.modules(module))):
            return IS_PREPARED.reason(place=self.names[id(module)][1][0] or type(module).__name__)
        if self._layers is not None and not isinstance(module, self._layers):
            return LAYER_NOT_NAMED.reason(kind=type(module).__name__)
        return None

    def _other_reader(self, calls: list[ModuleCall], prefixes: tuple[str, ...]) -> Node | None:
        """What reads a tensor of a module outside of its calls; another module that holds it too may read its own."""
        own = {node for call in calls for node in call.all_nodes}
        for leaf in {id(it): it for name, it in self.graph.leaves.items() if name.startswith(prefixes)}.values():
            holders = {name.rpartition(".")[0] for name in leaf.names if not name.startswith(prefixes)}
            others = {id(self.model.get_submodule(holder)) for holder in holders}
            for node in leaf.consumers:
                if node not in own and id(node.call.module) not in others:
                    return node
        return None

    def _like(self, module: nn.Module, name: str, run: Run) -> str | None:
        """The name of a parameter, of the module if it has any, of the dtype of the weight that it computes."""
        dtype = run.tensors["weight"].dtype
        own = (f"{name}.{place}" for place, tensor in module.named_parameters() if tensor.dtype == dtype)
        others = (place for place, tensor in self.model.named_parameters() if tensor.dtype == dtype)
        return next(own, next(others, None))


def _computing(call: ModuleCall) -> Run | None:
    """The layer that a call runs itself with a weight that it computes, None if there is none."""
    for node in call.nodes:
        run = layer_run(node)
        if run is not None and any(value.kind is Kind.COMPUTED and value.independent for value in run.tensors.values()):
            return run
    return None


def _is_all(call: ModuleCall, run: Run) -> bool:
    """Whether a call does nothing else than run one layer, once, on what it is given."""
    if not call.plain or call.inputs != [run.x] or call.outputs != [run.node.outputs[0]]:
        return False
    depending = [node for node in call.all_nodes if not all(made.independent for made in node.outputs)]
    return depending == [run.node]


def _is_worth_a_word(run: Run) -> bool:
    """Whether it is a layer whose weight is more than a parameter in another shape, or a part of one."""
    value = run.tensors["weight"]
    while value.producer is not None and FAMILIES.get(value.producer.operator) in _MOVES:
        value = value.producer.inputs[0]
    return run.kind != "Linear" and value.kind is Kind.COMPUTED


_MOVES = (Family.REARRANGEMENT, Family.PARTITION)


def _computed(module: nn.Module, places: list[str]) -> dict[str, Tensor]:
    """What a module computes in evaluation mode, in float64."""
    wide = float64_copy(module).eval()
    with torch.inference_mode(False), torch.no_grad(), InFloat64():
        for hook in wide._forward_pre_hooks.values():
            if type(getattr(hook, "__self__", hook)).__module__.startswith("torch.nn.utils."):
                hook(wide, ())
        return {place: getattr(wide, place).detach().clone() for place in places}


def _is_of(name: str, place: str) -> bool:
    """Whether a parameter is one that a tensor is computed of."""
    return name.startswith(f"parametrizations.{place}.") or name in (
        f"{place}_g", f"{place}_v", f"{place}_orig",
    )  # fmt: skip


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
