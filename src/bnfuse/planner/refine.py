"""Plans that keep more norms than the algebra asks for: for a budget of precision, or for code that looks at norms.

In float16, or with tiny variances, folding a norm can cost precision. The cost of each norm is measured by folding it
alone; then the most expensive ones are kept, as few as bring the whole below the budget, and each of these is tried
once more to see whether it has to stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnfuse.analysis.custom_layers import add_custom_layers
from bnfuse.capture.run import capture
from bnfuse.errors import InputError
from bnfuse.fusion_plan import Plan
from bnfuse.graph.norms import Norm
from bnfuse.model.copying import copy_model
from bnfuse.model.sandbox import run
from bnfuse.planner.culprits import culprits
from bnfuse.planner.planner import Planner
from bnfuse.planner.problem import Problem
from bnfuse.reasons import MODULE_IS_LOOKED_AT, OVER_BUDGET
from bnfuse.rewrite import fused_copy, rewrite
from bnfuse.rules import RULES
from bnfuse.verify.measure import compare_outputs


def within_budget(planner: Planner, budget: float) -> Plan:
    """The plan that removes the norms whose folding together costs at most ``budget``.

    Args:
        budget: relative L2 error of the outputs, against the original's in its own precision.
    """
    plan = planner.plan()
    if _error(planner, plan) <= budget:
        return plan
    fused = [norm for norm, decision in zip(planner.problem.norms, plan.decisions, strict=True) if decision.fused]

    reason = OVER_BUDGET.reason(budget=budget)

    def keeping(norms: list[Norm]) -> Plan:
        return planner.plan(dict.fromkeys(norms, reason), tried=False)

    def fits(norms: list[Norm]) -> bool:
        return _error(planner, keeping(norms)) <= budget

    alone = {norm: _error(planner, keeping([other for other in fused if other is not norm])) for norm in fused}
    order = sorted(fused, key=lambda norm: -alone[norm])
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(order[:middle]) else (middle + 1, high)
    kept = order[:low]
    for norm in reversed(order[:low]):
        fewer = [other for other in kept if other is not norm]
        if fits(fewer):
            kept = fewer
    return planner.plan(dict.fromkeys(kept, reason))


def _error(planner: Planner, plan: Plan) -> float:
    """Relative L2 error of the worst output."""
    if not plan.fused:
        return 0.0
    fused = fused_copy(plan, planner.problem.model)
    args, kwargs = planner.problem.inputs
    comparison = compare_outputs(planner.problem.output, run(fused, args, kwargs))
    return max((math.inf if output.problem else output.relative_l2 for output in comparison.outputs), default=0.0)


def without_misfits(planner: Planner, plan: Plan) -> Plan | None:
    """A plan that keeps the norms without which the code around them does something else; None if there are none.

    Code may look at the norm as an object: at its attributes or its class, or hold it in a place of its own.
    """
    problem = planner.problem
    fused = [norm for norm, decision in zip(problem.norms, plan.decisions, strict=True) if decision.fused]
    if _fits(problem, plan):
        return None
    reason = MODULE_IS_LOOKED_AT.reason()

    def fits(group: Sequence[Norm]) -> bool:
        staying = dict.fromkeys((norm for norm in fused if norm not in group), reason)
        return _fits(problem, planner.plan(staying, tried=False))

    bad = [norm for group in culprits(fused, fits, limited=False) for norm in group]
    return planner.plan(dict.fromkeys(bad, reason), tried=False)


def _fits(problem: Problem, plan: Plan) -> bool:
    """True if the fused model runs the same operators as the original, apart from those of the removed norms.

    This compares operators, not outputs: it tells which norm is to blame after ``same_outputs`` found that the
    outputs differ. Whether outputs are equal is decided by ``same_outputs`` alone.
    """
    fused = copy_model(problem.model)
    rewrite(plan, fused)  # as in place, where an object of the model's may still hold the norm
    gone = {id(problem.model.get_submodule(replacement.names[0])) for replacement in plan.replacements}
    expected = [node.operator for node in problem.graph.nodes if id(node.call.module) not in gone]
    try:
        graph = capture(fused, *problem.inputs, known=RULES).graph
    except InputError:
        return False
    add_custom_layers(fused, graph, problem.options.handlers)
    created = [name for edit in plan.edits if edit.created for name in edit.names]
    made = {graph.leaves[name] for name in created if name in graph.leaves}
    ran = []
    for node in graph.nodes:
        if made.issuperset(node.inputs) and node.inputs:
            made.update(node.outputs)  # parts of a bias that the original does not have
        else:
            ran.append(node.operator)
    return ran == expected
