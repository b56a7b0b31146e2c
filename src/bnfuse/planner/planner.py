"""From a model and its inputs to a plan: capture, look at the modules, solve, rehearse."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfuse.analysis.custom_layers import add_custom_layers
from bnfuse.analysis.missing_parameters import add_missing_parameters
from bnfuse.analysis.norms import find_norms
from bnfuse.analysis.pins import pin_others, pin_shared_with_idle
from bnfuse.capture.run import Capture, capture, capture_shapes
from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.errors import InputError, NoNormError
from bnfuse.fusion_plan import Plan, total
from bnfuse.graph.graph import Node
from bnfuse.graph.norms import Norm
from bnfuse.model.copying import copy_model
from bnfuse.model.describe import first_line
from bnfuse.model.inputs import candidates, normalise
from bnfuse.planner.options import Options
from bnfuse.planner.other_inputs import Rehearsal, needed_in_place, varying
from bnfuse.planner.other_sizes import Elsewhere
from bnfuse.reasons import (
    CALLER_KEEPS,
    FAILS_ON_OTHER_INPUTS,
    FAILS_ON_OTHER_INPUTS_TOGETHER,
    FAILS_ON_OTHER_INPUTS_WITH_OTHERS,
    MODULE_IS_LOOKED_AT,
    Reason,
)
from bnfuse.rewrite import rewrite
from bnfuse.rules import RULES
from bnfuse.solve.search import Solution, solve

log = logging.getLogger("bnfuse")


@dataclass(frozen=True)
class _Solution:
    """A plan and what it was made with.

    Attributes:
        kept: norms that were to stay.
        different: operators whose numbers are others at another size.
        forbidden: modules that must work in place.
    """

    solution: Solution
    plan: Plan
    kept: Mapping[Norm, Reason]
    different: set[Node]
    forbidden: list[nn.Module]


_TRIAL = FAILS_ON_OTHER_INPUTS.reason()  # in no plan that is handed out
_MANY_GROUPS = 4
"""So many groups of norms that all fail say that it is not one norm or another."""

_FEW = 8
"""So many norms are told apart whatever the number of trials."""


class Draft:
    """One run of a model, from which plans are made.

    Attributes:
        inputs: (args, kwargs) that the model ran on.
        output: what it returned, None for a run without arithmetic.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        record: Capture,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: Sequence[str] = (),
    ) -> None:
        self.model, self.options = model, options
        self.inputs = (args, kwargs)
        self.record, self.output, self.graph = record, record.output, record.graph
        self.handlers = options.handlers
        add_custom_layers(model, self.graph, self.handlers)
        self.norms = find_norms(model, self.graph, options.also)
        if not self.norms:
            raise NoNormError(f"{type(model).__name__} holds no batch norm, so there is nothing to fuse.")
        _check_also(model, options.also)
        self.kept = _kept(self.norms, keep)
        created, looks = add_missing_parameters(model, self.graph)
        self.looks = record.looks or looks
        pin_shared_with_idle(model, self.graph)
        if options.layers is not None:
            pin_others(model, [*self.graph.leaves.values(), *created], tuple(options.layers))

    @staticmethod
    def of(
        model: nn.Module, example_inputs: Any, options: Options, keep: Sequence[str] = (), contents: bool = True
    ) -> Draft:
        """Run the model; ``contents=False`` is for a run without arithmetic, where the model allows it."""
        return Draft(model, options, *captured(model, example_inputs, contents), keep)

    def plan(self, kept: Mapping[Norm, Reason] | None = None, rehearsed: bool = True) -> Plan:
        """Solve, look at what the plan takes for granted, and solve again without what does not hold.

        Args:
            kept: further norms to keep, with the reason.
            rehearsed: try the plan on other inputs too, where the code of the model gives reason to.
        """
        kept = {**self.kept, **(kept or {})}
        solution = self._solved(kept)
        plan = solution.plan
        if not rehearsed or not (self.looks or self.record.stateful) or self._holds(solution):
            return plan
        fused = [norm for norm, decision in zip(self.norms, plan.decisions, strict=True) if decision.fused]
        bad = self._refused(fused, kept)
        if len(bad) < len(fused):
            solution = self._solved({**kept, **bad})
            if self._holds(solution):
                return solution.plan
        together = FAILS_ON_OTHER_INPUTS_TOGETHER.reason()
        return self._solved({**kept, **{norm: bad.get(norm, together) for norm in fused}}).plan

    def _refused(self, norms: list[Norm], kept: Mapping[Norm, Reason]) -> dict[Norm, Reason]:
        """Those of the norms that cannot go where the model is given other inputs, or not surely.

        Every trial runs the whole model, so the norms are tried in halves, and those of a half that fails in halves
        again; where the first half holds, the second one is to blame. If nearly every group fails, the norms have
        something in common that no further halving tells, and all that are left stay.
        """
        failing, found = [norms], []
        while failing:
            found += [group for group in failing if len(group) == 1]
            tried = [group for group in failing if len(group) > 1]
            left = sum(map(len, tried))
            if left > _FEW and (len(tried) > 2 * _MANY_GROUPS or len(tried) == len(failing) >= _MANY_GROUPS):
                found += tried
                break
            failing = []
            for group in tried:
                first, second = group[: len(group) // 2], group[len(group) // 2 :]
                holds = self._hold_alone(first, norms, kept)
                failing += [second] if holds else [first]
                if not holds and not self._hold_alone(second, norms, kept):
                    failing.append(second)
        alone = FAILS_ON_OTHER_INPUTS.reason()
        among_others = FAILS_ON_OTHER_INPUTS_WITH_OTHERS.reason()
        return {norm: alone if len(group) == 1 else among_others for group in found for norm in group}

    def _hold_alone(self, group: list[Norm], norms: list[Norm], kept: Mapping[Norm, Reason]) -> bool:
        """True if these of the norms can go while the others stay."""
        staying = dict.fromkeys((norm for norm in norms if norm not in group), _TRIAL)
        return self._holds(self._solved({**kept, **staying}))

    def _holds(self, solution: _Solution) -> bool:
        """True if the plan holds for other inputs: if it would be made for them too, or in trials."""
        if not solution.plan.fused:
            return True
        if not self.record.stateful and not solution.different:
            return self._made_elsewhere(solution)
        return self._rehearsal.holds(solution.plan)

    def _made_elsewhere(self, solution: _Solution) -> bool:
        """True if the model runs at no other size, or the plan made from what runs there is the same."""
        for call, record in self._elsewhere:
            if record is None:  # the code looks at contents, so that other contents must be tried
                return self._rehearsal.holds(solution.plan)
            other = Draft(self.model, self.options, record, *call)
            if [norm.label for norm in other.norms] != [norm.label for norm in self.norms]:
                return False
            kept = {
                norm: solution.kept[own]
                for norm, own in zip(other.norms, self.norms, strict=True)
                if own in solution.kept
            }
            made = solve(other.graph, other.norms, kept, (), solution.forbidden)
            same = solution.solution.same_as(made)
            return same or self._rehearsal.holds(solution.plan)
        return self._elsewhere.runs_without_arithmetic or self._rehearsal.holds(solution.plan)

    @functools.cached_property
    def _elsewhere(self) -> Elsewhere:
        return Elsewhere(self.model, *self.inputs)

    @functools.cached_property
    def _rehearsal(self) -> Rehearsal:
        return Rehearsal(self.model, *self.inputs, self._elsewhere, self.record.stateful)

    def without_misfits(self, plan: Plan) -> Plan | None:
        """A plan that keeps the norms without which the code around them does something else; None if there are none.

        Code may look at the norm as an object: at its attributes or its class, or hold it in a place of its own.
        """
        fused = [norm for norm, decision in zip(self.norms, plan.decisions, strict=True) if decision.fused]
        if self._fits(plan):
            return None
        reason = MODULE_IS_LOOKED_AT.reason()
        bad = {}
        for norm in fused:
            alone = self._solved({**self.kept, **{other: reason for other in fused if other is not norm}}).plan
            if not self._fits(alone):
                bad[norm] = reason
        return self._solved({**self.kept, **bad}).plan if bad else None

    def _fits(self, plan: Plan) -> bool:
        """True if the fused model runs the same operators as the original, apart from those of the removed norms.

        This compares operators, not outputs: it tells which norm is to blame after ``same_outputs`` found that the
        outputs differ. Whether outputs are equal is decided by ``same_outputs`` alone.
        """
        fused = copy_model(self.model)
        rewrite(plan, fused)  # as in place, where an object of the model's may still hold the norm
        gone = {id(self.model.get_submodule(replacement.names[0])) for replacement in plan.replacements}
        expected = [node.operator for node in self.graph.nodes if id(node.call.module) not in gone]
        try:
            graph = capture(fused, *self.inputs, known=RULES).graph
        except InputError:
            return False
        add_custom_layers(fused, graph, self.handlers)
        created = [name for edit in plan.edits if edit.created for name in edit.names]
        made = {graph.leaves[name] for name in created if name in graph.leaves}
        ran = []
        for node in graph.nodes:
            if made.issuperset(node.inputs) and node.inputs:
                made.update(node.outputs)  # parts of a bias that the original does not have
            else:
                ran.append(node.operator)
        return ran == expected

    def _solved(self, kept: Mapping[Norm, Reason]) -> _Solution:
        graph = self.graph
        checked: set[Node] = set()
        different: set[Node] = set()
        forbidden: list[nn.Module] = []
        while True:
            made = solve(graph, self.norms, kept, different, forbidden)
            assumed = made.assumptions
            # A sum counts for itself; any other number can follow the size only if the code looks at it.
            new = {node for node in assumed.numbers - checked if self.looks or node.operator == "sum"}
            varied = varying(graph, new, self._elsewhere) if new else set()
            needed = needed_in_place(self.model, graph, assumed.out_of_place, *self.inputs)
            if not varied and not needed:
                break
            checked |= new
            different |= varied
            forbidden += needed
        names = {id(module): name for name, module in self.model.named_modules()} if assumed.out_of_place else {}
        plan = Plan(
            model=type(self.model).__name__,
            decisions=made.decisions,
            edits=made.changes.edits,
            replacements=made.changes.replacements,
            out_of_place=tuple(names[id(module)] for module in assumed.out_of_place),
        )
        return _Solution(made, plan, kept, different, forbidden)

    def release(self) -> None:
        """Free what was recorded; no plan can be made afterwards."""
        self.graph.release()
        if "_elsewhere" in self.__dict__:
            self._elsewhere.release()

    def witness(self, plan: Plan) -> dict[str, float]:
        """A number for every tensor that the plan was made from, by name."""
        nodes = [node for norm in self.norms for site in norm.sites for node in site.nodes]
        read = {name for node in nodes for value in node.inputs for name in value.names[:1]}
        read |= {edit.names[0] for edit in plan.edits if not edit.created and edit.handler is None}
        tensors = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        return {name: total(tensors[name]) for name in sorted(read)}


def report(plan: Plan) -> None:
    """One line of the log for each norm."""
    for decision in plan.decisions:
        if decision.fused:
            log.info("%s: fused %s into %s", decision.norm, decision.direction, ", ".join(decision.into))
        else:
            log.info("%s: kept, %s", decision.norm, "; ".join(map(str, decision.reasons)))


def captured(
    model: nn.Module, example_inputs: Any, contents: bool = True
) -> tuple[Capture, tuple[Any, ...], dict[str, Any]]:
    """Run the model on the inputs, or on the first of the inferred ones that it takes."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        if not contents:
            with contextlib.suppress(NeedsContentsError, Exception):  # then it runs for real, and fails if it must
                return capture_shapes(model, args, kwargs, known=RULES)
        return capture(model, args, kwargs, known=RULES)

    if example_inputs is not None:
        args, kwargs = normalise(example_inputs)
        return run(args, kwargs), args, kwargs
    tried = []
    for candidate in candidates(model):
        try:
            return run(candidate.args, candidate.kwargs), candidate.args, candidate.kwargs
        except InputError as error:
            tried.append(f"  {candidate.description}: {first_line(error.__cause__ or error)}")
    name = type(model).__name__
    listing = "\n".join(["Tried:", *tried]) if tried else "Nothing in the model tells what it takes."
    raise InputError(
        f"No inputs for {name} could be inferred. {listing}\n"
        f"Pass inputs that it accepts: bnfuse.fuse(model, torch.randn(1, 3, 224, 224)), "
        f"a tuple for several arguments, a dict for keyword arguments."
    )


def _kept(norms: list[Norm], patterns: Sequence[str]) -> dict[Norm, Reason]:
    kept: dict[Norm, Reason] = {}
    names = [name for norm in norms for name in norm.names]
    for pattern in patterns:
        matching = [norm for norm in norms if any(fnmatch.fnmatchcase(name, pattern) for name in norm.names)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" They are named like {names[0]!r}." if names else ""
            raise InputError(f"keep={pattern!r} matches no batch norm of the model.{hint}")
        kept.update(dict.fromkeys(matching, CALLER_KEEPS.reason(pattern=pattern)))
    return kept


def _check_also(model: nn.Module, patterns: Sequence[str]) -> None:
    kinds = {type(module).__name__ for module in model.modules()}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(kind.lower(), pattern.lower()) for kind in kinds):
            near = difflib.get_close_matches(pattern.lower(), {kind.lower(): kind for kind in kinds}, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"also={pattern!r} matches the class of no module of the model.{hint}")
