"""From a problem to a plan: solve, look at what the solution takes for granted, and solve again without what fails."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from bnfuse.changes import Decision, Step
from bnfuse.fusion_plan import Plan
from bnfuse.graph.norms import Norm
from bnfuse.planner.assumptions import needed_in_place
from bnfuse.planner.culprits import culprits
from bnfuse.planner.problem import Problem
from bnfuse.planner.steps import clipped_norms, exact_contents, former_name, rounded_once, settled
from bnfuse.planner.trying_plans import Trials
from bnfuse.reasons import (
    CALLER_KEEPS,
    FAILS_ON_OTHER_INPUTS,
    FAILS_ON_OTHER_INPUTS_TOGETHER,
    FAILS_ON_OTHER_INPUTS_WITH_OTHERS,
    Reason,
)
from bnfuse.solve.search import Solution, solve

log = logging.getLogger("bnfuse")


class Planner:
    """Makes plans from one problem.

    Attributes:
        problem: what is solved.
        original: what plans are for, and are tried against; another problem than that which is solved where steps make
            a model of another structure of it first.
        steps: these steps.
    """

    def __init__(self, problem: Problem, original: Problem | None = None, steps: Sequence[Step] = ()) -> None:
        """
        Args:
            problem: the model with the steps carried out.
            original: the model without; None where there are no steps.
        """
        self.problem, self.original, self.steps = problem, original or problem, tuple(steps)
        self._exact = exact_contents(self.steps)
        clipped = clipped_norms(self.steps)
        self._last = {norm for norm in problem.norms if former_name(norm.label, self.steps) in clipped}

    def plan(self, kept: Mapping[Norm, Reason] | None = None) -> Plan:
        """Solve, look at what the solution takes for granted, and solve again without what does not hold.

        Args:
            kept: further norms to keep, with the reason.
        """
        problem = self.problem
        kept = {**problem.kept, **(kept or {})}
        forbidden: list[nn.Module] = []
        while True:
            made = solve(problem.graph, problem.norms, kept, problem.varying, forbidden, self._last)
            needed = needed_in_place(problem.recording, made.out_of_place)
            if not needed:
                break
            forbidden += needed
        names = {id(module): name for name, module in problem.model.named_modules()} if made.out_of_place else {}
        steps, edits = settled(self.steps, made.changes.edits)
        return Plan(
            model=type(problem.model).__name__,
            decisions=tuple(replace(one, norm=former_name(one.norm, self.steps)) for one in made.decisions),
            steps=steps,
            edits=tuple(rounded_once(edit, self._exact) for edit in edits),
            replacements=made.changes.replacements,
            out_of_place=tuple(names[id(module)] for module in made.out_of_place),
            unseen=tuple(self._unseen()),
        )

    def solution(self, plan: Plan) -> Solution | None:
        """How the norms that a plan removes go, with the units of every tensor; None if that is not known for certain.

        They are solved once more, and all others stay. What a plan is made from is not kept, since few ask for it.

        Args:
            plan: one that this planner has made.
        """
        problem = self.problem
        own = self.own_decisions(plan)
        kept = {
            norm: CALLER_KEEPS.reason(pattern="")
            for norm, decision in zip(problem.norms, own, strict=True)
            if decision is None or not decision.fused
        }
        names = {id(module): name for name, module in problem.model.named_modules()}
        forbidden: list[nn.Module] = []
        for _ in range(2):  # what is not in the plan, it was found, has to work in place
            made = solve(problem.graph, problem.norms, kept, problem.varying, forbidden, self._last)
            forbidden = [module for module in made.out_of_place if names.get(id(module)) not in plan.out_of_place]
            if not forbidden:
                break
        decided = [replace(one, norm=former_name(one.norm, self.steps)) for one in made.decisions if one.fused]
        same = decided == [decision for decision in own if decision is not None and decision.fused]
        return made if same and not forbidden else None

    def own_decisions(self, plan: Plan) -> list[Decision | None]:
        """What a plan says of each norm that is solved for; a plan with steps speaks of norms that these took, too."""
        if not self.steps:
            return list(plan.decisions)
        kinds = {step.kind for step in self.steps}
        waiting: dict[str, list[Decision]] = {}
        for decision in plan.decisions:
            if decision.direction not in kinds:
                waiting.setdefault(decision.norm, []).append(decision)
        labels = [former_name(norm.label, self.steps) for norm in self.problem.norms]
        return [waiting[label].pop(0) if waiting.get(label) else None for label in labels]

    def _unseen(self) -> Iterator[str]:
        """What the recorded calls did not show, in words."""
        yield from self.problem.unseen
        idle = self.problem.idle
        if idle:
            more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
            yield f"{idle[0]}{more} did not run: what the model does with it is not known"

    def without_failing(self, plan: Plan) -> Plan | None:
        """A plan that holds on the further calls, where this one does not; None if this one holds.

        Each trial runs the whole model, so norms are tried in groups (:mod:`bnfuse.planner.culprits`).
        """
        trials = self.trials
        if trials.holds(plan):
            return None
        stays = stays_for_the_whole(self.problem, plan)
        fused = [norm for norm, decision in zip(self.problem.norms, plan.decisions, strict=True) if decision.fused]

        def holds(group: Sequence[Norm]) -> bool:
            staying = dict.fromkeys((norm for norm in self.problem.norms if norm not in group), _TRIAL)
            return trials.holds(self.plan({**staying, **stays}))

        alone, among_others = FAILS_ON_OTHER_INPUTS.reason(), FAILS_ON_OTHER_INPUTS_WITH_OTHERS.reason()
        bad = {norm: alone if len(group) == 1 else among_others for group in culprits(fused, holds) for norm in group}
        if len(bad) < len(fused):
            better = self.plan({**stays, **bad})
            pairs = zip(self.problem.norms, better.decisions, strict=True)
            instead = [norm for norm, decision in pairs if decision.fused and norm not in fused]
            if instead and not trials.holds(better):
                bad |= {norm: alone for norm in instead if not holds([norm])}
                better = self.plan({**stays, **bad})
            if trials.holds(better):
                return better
        together = FAILS_ON_OTHER_INPUTS_TOGETHER.reason()
        return self.plan({**stays, **{norm: bad.get(norm, together) for norm in fused}})

    @functools.cached_property
    def trials(self) -> Trials:
        """Plans are tried on the further calls."""
        return Trials(self.original.model, self.original.further)

    def release(self) -> None:
        """Free what was recorded; no plan can be made afterwards."""
        for problem in (self.problem, self.original):
            problem.graph.release()


_TRIAL = FAILS_ON_OTHER_INPUTS.reason()  # in no plan that is handed out


def stays_for_the_whole(problem: Problem, plan: Plan) -> dict[Norm, Reason]:
    """The norms that a plan keeps for the whole of the model (a budget, a trial), and not for an operator."""
    pairs = zip(problem.norms, plan.decisions, strict=True)
    return {norm: d.reasons[0] for norm, d in pairs if not d.fused and d.reasons[0].direction is None}


def report(plan: Plan) -> None:
    """One line of the log for each norm."""
    for decision in plan.decisions:
        if decision.fused:
            log.info("%s: fused %s into %s", decision.norm, decision.direction, ", ".join(decision.into))
        else:
            log.info("%s: kept, %s", decision.norm, "; ".join(map(str, decision.reasons)))
