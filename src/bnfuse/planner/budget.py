"""A budget of precision: which norms to keep where folding costs more than it may.

In float16, or with tiny variances, folding a norm can cost precision. The cost of each norm is measured by folding it
alone; then the most expensive ones are kept, as few as bring the whole below the budget, and each of these is tried
once more to see whether it has to stay. No norm is to blame here, since errors add up, so this is not the search of
:mod:`bnfuse.planner.culprits`.
"""

from __future__ import annotations

import math

from bnfuse.fusion_plan import Plan
from bnfuse.graph.norms import Norm
from bnfuse.model.sandbox import run
from bnfuse.planner.planner import Planner
from bnfuse.reasons import OVER_BUDGET
from bnfuse.transaction import fused_copy
from bnfuse.verify.measure import compare_outputs
from bnfuse.verify.several_calls import SeveralCalls


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
        return planner.plan(dict.fromkeys(norms, reason))

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
    """Relative L2 error of the worst output of the first call, and of those that the caller has named."""
    if not plan.fused:
        return 0.0
    problem = planner.original
    fused = fused_copy(plan, problem.model)
    call = problem.main.call
    found = [compare_outputs(problem.main.output, run(fused, call.args, call.kwargs))]
    for further, reference in planner.trials.references:
        if further.given:
            found.append(compare_outputs(reference.output, reference.run(SeveralCalls(fused, further.calls))))
    outputs = [output for comparison in found for output in comparison.outputs]
    return max((math.inf if output.problem else output.relative_l2 for output in outputs), default=0.0)
