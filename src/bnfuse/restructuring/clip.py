r"""Clipping: a norm beside an activation that only clips becomes the bounds of the clip, or an addition.

For a norm ``s*x + t`` and an activation that keeps its input between two bounds, as ReLU does between 0 and infinity,

    clip(s*x + t, p, q)  =  s * median(x, (p - t)/s, (q - t)/s) + t,

for negative ``s`` too. So the activation becomes a clip with bounds of its own for each channel, and ``s`` and ``t`` go
on into the layers behind it, where it let no shift and no negative scale pass. A layer that pads with zeros takes no
shift; then the clip adds it, ``max(x, -t/s) + t/s``. Either way nothing is computed that was not computed before, and
less where the norm did not only scale. Behind an activation it is the same the other way round, into the layer before.

Where the activation is of another kind, or stands in code that stays, but a positive scale passes, the place of the
norm holds an addition: ``relu(s*x + t) = s*relu(x + t/s)``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bnfuse.changes import Former, NewLayer, Placement, Row, Source, Step
from bnfuse.fusion_plan import Plan
from bnfuse.graph.norms import Norm
from bnfuse.planner.assumptions import needed_in_place
from bnfuse.planner.problem import Problem
from bnfuse.restructuring.kinds import CLIP
from bnfuse.restructuring.layers import NORM
from bnfuse.restructuring.ownership import Owners, StaysError

SHIFT = "shift"
"""The name of the addition behind a norm in the place of that norm."""


def clipped(problem: Problem, plan: Plan, adding: Collection[str], additions: bool) -> list[Step]:
    """Steps that let the norms go that stay beside an activation.

    Args:
        problem: the model.
        plan: of fusing it as it is.
        adding: the names of activations whose clip adds a shift as well, since none can go on.
        additions: whether norms without such an activation may become additions.
    """
    search = _Search(problem, adding)
    for norm, decision in zip(problem.norms, plan.decisions, strict=True):
        if decision.fused or norm.obstacle is not None or norm in problem.kept or not norm.names or not norm.sites:
            continue
        like = _like(problem.model.get_submodule(norm.names[0]), norm.names[0])
        shape = _shape(norm)
        if like is not None and shape is not None and not search.add_clips(norm, like, shape) and additions:
            search.add_addition(norm, like, shape)
    search.leave_out_needed_in_place()
    return list(search.found.values())


class _Search:
    """Steps, by the names of the modules that they are about."""

    def __init__(self, problem: Problem, adding: Collection[str]) -> None:
        self.problem, self.adding = problem, adding
        self.owners = Owners(problem.model, problem.graph)
        self.found: dict[str, Step] = {}

    def add_clips(self, norm: Norm, like: str, shape: tuple[int, ...]) -> bool:
        """Steps for the activations right behind and right before a norm; whether there is one."""
        nodes = [node for site in norm.sites for node in (*site.y.consumers, site.x.producer) if node is not None]
        activations = {id(node.call.module): node.call.module for node in nodes if bounds_of(node.call.module)}
        found = False
        for activation in activations.values():
            if not self._is_free(activation, norm):
                continue
            found = True
            names = self.owners.names[id(activation)]
            known = self.found.get(names[0])
            if known is not None:
                self.found[names[0]] = replace(known, norms=(*known.norms, norm.names[0]))
                continue
            bounds = bounds_of(activation)
            assert bounds is not None
            contents = dict(zip(("lower", "upper"), bounds, strict=True))
            if names[0] in self.adding:
                contents["bias"] = 0.0
            self.found[names[0]] = Step(
                kind=CLIP,
                subject=names[0],
                what=f"bounds for each of {norm.channels} channels",
                placements=(Placement(tuple(names), _layer(shape, like, contents)),),
                norms=(norm.names[0],),
            )
        return found

    def add_addition(self, norm: Norm, like: str, shape: tuple[int, ...]) -> None:
        """A step that puts an addition behind a norm."""
        if norm.keep:
            return
        row = Row(((NORM, Former()), (SHIFT, _layer(shape, like, {"bias": 0.0}))))
        self.found[norm.names[0]] = Step(
            kind=CLIP,
            subject=norm.names[0],
            what=f"an addition for each of {norm.channels} channels",
            placements=(Placement(norm.names, row),),
            norms=(norm.names[0],),
        )

    def leave_out_needed_in_place(self) -> None:
        """Take away the steps for activations whose callers count on their working in place, which no clip does."""
        problem = self.problem
        modules = {name: problem.model.get_submodule(name) for name in self.found}
        in_place = {name: module for name, module in modules.items() if getattr(module, "inplace", False) is True}

        def needed(names: Iterable[str]) -> bool:
            some = [in_place[name] for name in names]
            return bool(needed_in_place(problem.recording, some))

        if needed(in_place):
            for name in in_place:
                if needed([name]):
                    del self.found[name]

    def _is_free(self, activation: nn.Module, norm: Norm) -> bool:
        """Whether another module can stand in the place of an activation, which only runs beside a norm."""
        if id(activation) not in self.owners.names:
            return False
        before, behind = ({site.x for site in norm.sites}, {site.y for site in norm.sites})
        for call in self.owners.calls.get(id(activation), ()):
            if not call.plain or not call.is_standard or len(call.nodes) != 1 or len(call.inputs) != 1:
                return False
            if call.inputs[0] not in behind and not (call.outputs and call.outputs[0] in before):
                return False
        try:
            self.owners.check([activation], [], ())
        except StaysError:
            return False
        return True


def bounds_of(activation: nn.Module) -> tuple[float, float] | None:
    """Between which bounds an activation keeps its input; None if it is another function.

    >>> bounds_of(nn.ReLU6()), bounds_of(nn.GELU())
    ((0.0, 6.0), None)
    """
    kind = type(activation)
    if kind is nn.ReLU:
        return 0.0, math.inf
    if kind in (nn.ReLU6, nn.Hardtanh):
        assert isinstance(activation, nn.Hardtanh)
        return float(activation.min_val), float(activation.max_val)
    return None


def open_places(steps: Sequence[Step]) -> set[str]:
    """The names of the clips that steps put in the places of activations."""
    return {
        name
        for step in steps
        for placement in step.placements
        if step.kind == CLIP and isinstance(placement.module, NewLayer)
        for name in placement.names
    }


def _shape(norm: Norm) -> tuple[int, ...] | None:
    """Of numbers for each channel, wherever the norm is applied; None if the channels are not always on axis 1."""
    dimensions = {len(site.y.shape) for site in norm.sites}
    if len(dimensions) != 1 or any(site.y.shape[1:2] != (norm.channels,) for site in norm.sites):
        return None
    return (norm.channels, *(1,) * (dimensions.pop() - 2))


def _like(norm: nn.Module, name: str) -> str | None:
    """The tensor of a norm that gives the clip its dtype and device."""
    held: Iterator[tuple[str, Tensor | None]] = iter([*norm._parameters.items(), *norm._buffers.items()])
    return next((f"{name}.{place}" for place, it in held if it is not None and it.is_floating_point()), None)


def _layer(shape: tuple[int, ...], like: str, contents: dict[str, float]) -> NewLayer:
    settings = {name: name in contents for name in ("lower", "upper", "bias")}
    sources = {
        name: Source(like, torch.full(shape, number, dtype=torch.float64, device="cpu"))
        for name, number in contents.items()
    }
    return NewLayer("Clip", {"shape": shape, **settings}, sources)
