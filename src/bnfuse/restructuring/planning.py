"""From a problem and the kinds that are asked for to a plan with steps, each of which is worth its price and holds."""

from __future__ import annotations

import gc
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from bnfuse.capture.run import Recording
from bnfuse.changes import Changes, Decision, Step, Unchanged
from bnfuse.errors import FusionError
from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Node
from bnfuse.graph.norms import Norm
from bnfuse.model import tree
from bnfuse.model.copying import copy_model
from bnfuse.model.pretrained import is_guarded, lenient_places
from bnfuse.planner.culprits import culprits
from bnfuse.planner.planner import Planner
from bnfuse.planner.problem import Problem
from bnfuse.planner.steps import clips_for_long, exact_contents, former_name, is_idle
from bnfuse.planner.trying_plans import Trials
from bnfuse.reasons import (
    CLIP_TAKES_LONGER,
    COSTS_NORMS,
    GAINS_NOTHING,
    LAYER_IS_LOOKED_AT,
    LOADS_WITHOUT_A_WORD,
    Cause,
)
from bnfuse.restructuring import losses
from bnfuse.restructuring.bake import baked
from bnfuse.restructuring.clip import clipped, open_places
from bnfuse.restructuring.kinds import BAKE, CLIP, MERGE, UNTIE
from bnfuse.restructuring.merge import merged
from bnfuse.restructuring.untie import untied
from bnfuse.transaction import fused_copy, rewrite
from bnfuse.verify.equivalence import same_outputs
from bnfuse.verify.reference import Reference

log = logging.getLogger("bnfuse")

_ROUNDS = {BAKE: 3, UNTIE: 3, MERGE: 3, CLIP: 2}
"""So many times a kind is proposed: what one step makes may be what another needs."""


class Restructuring:
    """Makes plans with steps for one problem.

    Attributes:
        original: the problem.
        kinds: what is asked for.
    """

    def __init__(self, original: Problem, kinds: Sequence[str]) -> None:
        self.original, self.kinds = original, kinds
        self._dropped: dict[tuple[str, str], Unchanged] = {}
        self._unchanged: dict[tuple[str, str], Unchanged] = {}
        self._adding: set[str] = set()
        self._open: Sequence[Step] = ()  # clips with the bounds of the activations that they stand for
        self._before: Plan | None = None

    def plan(self, make: Callable[[Planner], Plan]) -> tuple[Planner, Plan]:
        """The planner of the restructured model, and its plan.

        Args:
            make: what makes a plan of a planner.
        """
        while True:
            planner, made = self._planned(make)
            if not self._drops_any(planner, made):
                self._open = planner.steps
                return planner, made

    def _drops_any(self, planner: Planner, made: Plan) -> bool:
        """Drop steps that are not worth it; whether there are any, so that the plan has to be made anew."""
        useless = self._useless(planner, made)
        waiting = {step.subject for step, gains in useless.items() if step.kind == CLIP and not gains} - self._adding
        self._adding |= waiting  # they may gain something yet
        self._drop([step for step in useless if step.subject not in waiting], GAINS_NOTHING)
        if useless:
            return True
        searches: tuple[tuple[Callable[[], list[Step]], Cause], ...] = (
            (lambda: [step for step in made.steps if clips_for_long(step)], CLIP_TAKES_LONGER),
            (lambda: self._costly(planner, made), COSTS_NORMS),
            (lambda: self._unguarded(made), LOADS_WITHOUT_A_WORD),
        )
        for search, cause in searches:
            steps = search()
            self._drop(steps, cause)
            if steps:
                return True
        return False

    def complete(self, made: Plan) -> Plan:
        """The plan with a decision for every norm of the original, also for those that a step took away."""
        taken = {
            former_name(norm, made.steps[:place]): step
            for place, step in enumerate(made.steps)
            for norm in (step.norms if step.kind in (BAKE, MERGE) else ())
        }
        rest: dict[str, list[Decision]] = {}
        for decision in made.decisions:
            rest.setdefault(decision.norm, []).append(decision)
        decisions = []
        for norm in self.original.norms:
            step = taken.get(norm.label)
            if rest.get(norm.label):
                decisions.append(rest[norm.label].pop(0))
            elif step is not None:
                decisions.append(Decision(norm.label, norm.kind, norm.channels, True, step.kind, (step.subject,)))
        decisions += [decision for others in rest.values() for decision in others]
        unchanged = {**self._unchanged, **self._dropped}
        said = [it for it in unchanged.values() if it.kind != CLIP or it.reason.code != GAINS_NOTHING.code]
        return replace(made, decisions=tuple(decisions), unchanged=tuple(said))

    def drop_failing(self) -> bool:
        """Drop the steps of the last plan that change what the original gives; True if there are any.

        Each is tried behind those before it that hold. One that rests on another that fails is planned anew.
        """
        holding: list[Step] = []
        failing: list[Step] = []
        for step in self._open:
            try:
                (holding if self._holds(Changes(steps=(*holding, step))) else failing).append(step)
            except FusionError:
                if not failing:
                    raise
        self._drop(failing, LAYER_IS_LOOKED_AT)
        return bool(failing)

    def _planned(self, make: Callable[[Planner], Plan]) -> tuple[Planner, Plan]:
        self._unchanged = {}
        steps: list[Step] = []
        problem = self.original
        for kind in (BAKE, UNTIE, MERGE, CLIP):
            for turn in range(_ROUNDS[kind] if kind in self.kinds else 0):
                if kind == BAKE:
                    found, unchanged = baked(problem)
                elif kind == MERGE:
                    found, unchanged = merged(problem)
                elif kind == CLIP:
                    found, unchanged = clipped(problem, self._plain(problem), self._adding, not turn), []
                else:
                    found, unchanged = untied(problem, lambda problem=problem: self._plain(problem))  # type: ignore[misc]
                self._unchanged.update({(one.kind, one.subject): one for one in unchanged})
                found = [step for step in found if (step.kind, step.subject) not in self._dropped]
                if not found:
                    break
                steps, problem = self._carried_out(steps, found)
        return Planner(problem, self.original, steps), make(Planner(problem, self.original, steps))

    # Carrying out ----------------------------------------------------------------------------------------------------

    def _carried_out(self, steps: list[Step], found: list[Step]) -> tuple[list[Step], Problem]:
        """The steps with those that are found, as far as the model runs in the same way with them; and the problem."""
        whole = self._tried(steps, found)
        if whole is None:
            groups = culprits(found, lambda group: self._tried(steps, group) is not None)
            bad = [step for group in groups for step in group]
            self._drop(bad, LAYER_IS_LOOKED_AT)
            found = [step for step in found if step not in bad]
            whole = self._tried(steps, found)
            if whole is None:
                self._drop(found, LAYER_IS_LOOKED_AT)
                whole = self._tried(steps, [])
        assert whole is not None
        return whole

    def _tried(self, steps: list[Step], found: Sequence[Step]) -> tuple[list[Step], Problem] | None:
        """The steps with their prices, and the model with them; None where its code does something else."""
        if not steps and not found:
            return [], self.original
        model = copy_model(self.original.model)
        priced = []
        for step in (*steps, *found):
            before = _size(model)
            try:
                rewrite(Changes(steps=(step,)), model)
            except FusionError as error:  # what it is to hold leaves the range of the dtype
                log.info("%s: %s", step, error)
                return None
            priced.append(replace(step, parameters=_size(model) - before))
        problem = _problem(self.original, model, priced)
        if problem is None or not _is_same_work(
            *(_work(one, priced)[: len(self.original.recording.runs)] for one in (self.original, problem))
        ):
            return None
        return priced, problem

    def _useless(self, planner: Planner, made: Plan) -> dict[Step, bool]:
        """The steps that untie or clip something and let no more norms go than go without any steps; and whether their
        norms go all the same."""
        norms = {
            step: {former_name(norm, planner.steps[:place]) for norm in step.norms}
            for place, step in enumerate(planner.steps)
            if step.kind in (UNTIE, CLIP)
        }
        if not norms:
            return {}
        before, gone = ({one.norm for one in plan.fused} for plan in (self._plain(self.original), self.complete(made)))
        idle = {step for step, after in zip(planner.steps, made.steps, strict=True) if is_idle(step, after)}
        gain = {
            step: bool(own & gone) if step.kind == CLIP else len(gone & own) > len(before & own)
            for step, own in norms.items()
        }
        return {step: gains for step, gains in gain.items() if step in idle or not gains}

    def _costly(self, planner: Planner, made: Plan) -> list[Step]:
        """The steps with which norms stay that go without any: see :mod:`bnfuse.restructuring.losses`."""
        problem = self.original
        if problem.options.budget is not None:  # what that keeps says nothing of the steps
            made = planner.plan()
        now = losses.gone(self.complete(made).decisions)
        able = Counter(norm.label for norm in problem.norms if norm.obstacle is None and norm not in problem.kept)
        if not planner.steps or able <= now:
            return []
        plainly = losses.gone(self._plain(problem).decisions)
        if plainly <= now:
            return []

        def go_with(steps: Sequence[Step]) -> losses.Gone:
            if len(steps) in (0, len(planner.steps)):
                return now if steps else plainly
            gc.collect()  # each trial has a copy of the model
            tried = self._tried([], steps)
            if tried is None:  # one needs another that is not among them
                return losses.Gone()
            return losses.gone(self.complete(Planner(tried[1], problem, tried[0]).plan()).decisions)

        return losses.costly(planner.steps, plainly, go_with)

    def _unguarded(self, made: Plan) -> list[Step]:
        """The steps, where nothing would keep a library that is lenient about names from loading a file of the model
        into one of another structure: see :mod:`bnfuse.model.pretrained`."""
        places = lenient_places(dict(tree.named_modules(self.original.model)))
        if not places or any(is_guarded(replacement.names, places) for replacement in made.replacements):
            return []
        return list(made.steps)

    def _plain(self, problem: Problem) -> Plan:
        """The plan of a problem as it is; that of the original is kept."""
        if problem is not self.original:
            return Planner(problem).plan()
        if self._before is None:
            self._before = Planner(problem).plan()
        return self._before

    # Dropping --------------------------------------------------------------------------------------------------------

    def _drop(self, steps: Iterable[Step], cause: Cause) -> None:
        for step in steps:
            log.info("dropped %s: %s", step, cause.text)
            self._dropped[step.kind, step.subject] = Unchanged(step.kind, step.subject, cause.reason())

    def _holds(self, changes: Changes) -> bool:
        """True if the model gives the same with the changes, on all calls."""
        original, main = self.original.model, self.original.main

        def in_float64(wide: nn.Module) -> nn.Module:
            rewrite(changes, wide)
            return wide

        changed = fused_copy(changes, original).eval()
        verdict = same_outputs(
            Reference(original, *main.call.inputs, output=main.output, gradients=main.gradients), changed, in_float64
        )
        return verdict.equal and Trials(original, self.original.further).failure(changes, changed) is None


def _problem(original: Problem, model: nn.Module, steps: Sequence[Step]) -> Problem | None:
    """The same calls of a model with steps carried out as a problem; None if it does not take one of them."""
    try:
        recording: Recording = original.recording.of(model)
    except Exception:  # noqa: BLE001 (whatever the code around a module raises that is another one now)
        return None
    clips = open_places(steps)
    problem = Problem(model, original.options, recording, (), original.further, original.unseen, clips)
    reasons = {norm.label: reason for norm, reason in original.kept.items()}
    labels: dict[Norm, str] = {norm: former_name(norm.label, steps) for norm in problem.norms}
    problem.kept = {norm: reasons[label] for norm, label in labels.items() if label in reasons}
    for name, contents in exact_contents(steps).items():
        if name in recording.graph.leaves:
            recording.graph.leaves[name].tensor = contents  # plans are made from what was not yet rounded
    return problem


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _work(problem: Problem, steps: Sequence[Step]) -> list[list[tuple[str, Any, Any]]]:
    """The operators of each run, their numbers and the shapes of what they make, without those of modules that steps
    change."""
    places = {name for step in steps for placement in step.placements for name in placement.names}
    inside = tuple(f"{name}." for name in places)
    owners = {name.rpartition(".")[0] for step in steps for tensor in step.tensors for name in tensor.names}
    inside += tuple(f"{name}.parametrizations.".lstrip(".") for name in owners)

    def counts(node: Node) -> bool:
        path = node.call.path
        return path is None or not (path in places or path in owners or path.startswith(inside))

    return [
        [(node.operator, node.numbers, [made.shape for made in node.outputs]) for node in run.nodes if counts(node)]
        for run in problem.recording.runs
    ]


def _is_same_work(before: list[list[tuple[str, Any, Any]]], after: list[list[tuple[str, Any, Any]]]) -> bool:
    """Whether runs did the same, where a branch that gives nothing may make a single number of a tensor."""
    if [len(run) for run in before] != [len(run) for run in after]:
        return False
    pairs = zip(itertools.chain(*before), itertools.chain(*after), strict=True)
    return all(one[:2] == other[:2] and (one[2] == other[2] or other[2] == [()]) for one, other in pairs)
