"""From a problem to a plan: solve, look at what the solution takes for granted, and solve again without what fails."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Node
from bnfuse.graph.norms import Norm
from bnfuse.planner.assumptions import needed_in_place, varying
from bnfuse.planner.culprits import culprits
from bnfuse.planner.larger_inputs import OtherSizes
from bnfuse.planner.problem import Problem
from bnfuse.planner.trying_plans import OtherInputs
from bnfuse.reasons import (
    FAILS_ON_OTHER_INPUTS,
    FAILS_ON_OTHER_INPUTS_TOGETHER,
    FAILS_ON_OTHER_INPUTS_WITH_OTHERS,
    Reason,
)
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


class Planner:
    """Makes plans from one problem.

    Attributes:
        problem: what is solved.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def plan(self, kept: Mapping[Norm, Reason] | None = None, tried: bool = True) -> Plan:
        """Solve, look at what the plan takes for granted, and solve again without what does not hold.

        Args:
            kept: further norms to keep, with the reason.
            tried: try the plan on other inputs too, where the code of the model gives reason to.
        """
        kept = {**self.problem.kept, **(kept or {})}
        solution = self._solved(kept)
        plan = solution.plan
        if not tried or not (self.problem.looks or self.problem.stateful) or self._holds(solution):
            return plan
        fused = [norm for norm, decision in zip(self.problem.norms, plan.decisions, strict=True) if decision.fused]
        bad = self._refused(fused, kept)
        if len(bad) < len(fused):
            solution = self._solved({**kept, **bad})
            if self._holds(solution):
                return solution.plan
        together = FAILS_ON_OTHER_INPUTS_TOGETHER.reason()
        return self._solved({**kept, **{norm: bad.get(norm, together) for norm in fused}}).plan

    def _refused(self, norms: list[Norm], kept: Mapping[Norm, Reason]) -> dict[Norm, Reason]:
        """Those of the norms that cannot go where the model is given other inputs, or not surely."""

        def holds(group: Sequence[Norm]) -> bool:
            staying = dict.fromkeys((norm for norm in norms if norm not in group), _TRIAL)
            return self._holds(self._solved({**kept, **staying}))

        alone, among_others = FAILS_ON_OTHER_INPUTS.reason(), FAILS_ON_OTHER_INPUTS_WITH_OTHERS.reason()
        return {norm: alone if len(group) == 1 else among_others for group in culprits(norms, holds) for norm in group}

    def _holds(self, solution: _Solution) -> bool:
        """True if the plan holds for other inputs: if it would be made for them too, or in trials."""
        if not solution.plan.fused:
            return True
        if not self.problem.stateful and not solution.different:
            return self._same_at_other_sizes(solution)
        return self._other_inputs.holds(solution.plan)

    def _same_at_other_sizes(self, solution: _Solution) -> bool:
        """True if the model runs at no other size, or the plan made from what runs there is the same."""
        for call, record in self._other_sizes:
            if record is None:  # the code looks at contents, so that other contents must be tried
                return self._other_inputs.holds(solution.plan)
            other = Problem(self.problem.model, self.problem.options, record, *call)
            if [norm.label for norm in other.norms] != [norm.label for norm in self.problem.norms]:
                return False
            kept = {
                norm: solution.kept[own]
                for norm, own in zip(other.norms, self.problem.norms, strict=True)
                if own in solution.kept
            }
            made = solve(other.graph, other.norms, kept, (), solution.forbidden)
            same = solution.solution.same_as(made)
            return same or self._other_inputs.holds(solution.plan)
        return self._other_sizes.runs_without_arithmetic or self._other_inputs.holds(solution.plan)

    @functools.cached_property
    def _other_sizes(self) -> OtherSizes:
        return OtherSizes(self.problem.model, *self.problem.inputs)

    @functools.cached_property
    def _other_inputs(self) -> OtherInputs:
        return OtherInputs(self.problem.model, *self.problem.inputs, self._other_sizes, self.problem.stateful)

    def _solved(self, kept: Mapping[Norm, Reason]) -> _Solution:
        problem = self.problem
        graph = problem.graph
        checked: set[Node] = set()
        different: set[Node] = set()
        forbidden: list[nn.Module] = []
        while True:
            made = solve(graph, problem.norms, kept, different, forbidden)
            assumed = made.assumptions
            # A sum counts for itself; any other number can follow the size only if the code looks at it.
            new = {node for node in assumed.numbers - checked if problem.looks or node.operator == "sum"}
            varied = varying(graph, new, self._other_sizes) if new else set()
            needed = needed_in_place(problem.model, graph, assumed.out_of_place, *problem.inputs)
            if not varied and not needed:
                break
            checked |= new
            different |= varied
            forbidden += needed
        names = {id(module): name for name, module in problem.model.named_modules()} if assumed.out_of_place else {}
        plan = Plan(
            model=type(problem.model).__name__,
            decisions=made.decisions,
            edits=made.changes.edits,
            replacements=made.changes.replacements,
            out_of_place=tuple(names[id(module)] for module in assumed.out_of_place),
        )
        return _Solution(made, plan, kept, different, forbidden)

    def release(self) -> None:
        """Free what was recorded; no plan can be made afterwards."""
        self.problem.graph.release()
        if "_other_sizes" in self.__dict__:
            self._other_sizes.release()


def report(plan: Plan) -> None:
    """One line of the log for each norm."""
    for decision in plan.decisions:
        if decision.fused:
            log.info("%s: fused %s into %s", decision.norm, decision.direction, ", ".join(decision.into))
        else:
            log.info("%s: kept, %s", decision.norm, "; ".join(map(str, decision.reasons)))
