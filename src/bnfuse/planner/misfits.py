"""Norms that the code around them looks at as objects, so that the model does something else without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bnfuse.capture.run import capture
from bnfuse.errors import InputError
from bnfuse.fusion_plan import Plan
from bnfuse.graph.norms import Norm
from bnfuse.model.copying import copy_model
from bnfuse.planner.culprits import culprits
from bnfuse.planner.planner import Planner, stays_for_the_whole
from bnfuse.planner.problem import Problem
from bnfuse.reasons import MODULE_IS_LOOKED_AT
from bnfuse.rules import RULES
from bnfuse.transaction import rewrite


def without_misfits(planner: Planner, plan: Plan) -> Plan | None:
    """A plan that keeps the norms without which the code around them does something else; None if there are none.

    Code may look at the norm as an object: at its attributes or its class, or hold it in a place of its own. What the
    plan kept for the whole of the model (for other inputs, a budget) stays kept, and the result is tried on other
    inputs as any plan.
    """
    problem = planner.problem
    if _fits(problem, plan):
        return None
    reason = MODULE_IS_LOOKED_AT.reason()
    kept = stays_for_the_whole(problem, plan)
    fused = [norm for norm, decision in zip(problem.norms, plan.decisions, strict=True) if decision.fused]

    def fits(group: Sequence[Norm]) -> bool:
        staying = dict.fromkeys((norm for norm in problem.norms if norm not in group), reason)
        return _fits(problem, planner.plan({**staying, **kept}))

    found = [norm for group in culprits(fused, fits, limited=False) for norm in group]
    bad = [norm for norm in found if not fits([norm])] or found  # each alone may go another way than all together
    return planner.plan({**kept, **dict.fromkeys(bad, reason)}) if bad else None


def _fits(problem: Problem, plan: Plan) -> bool:
    """True if the fused model runs the same operators, with the same numbers, apart from those of the removed norms.

    This compares what runs, not outputs: it tells which norm is to blame after ``same_outputs`` found that the
    outputs differ. Whether outputs are equal is decided by ``same_outputs`` alone.
    """
    fused = copy_model(problem.model)
    plan = replace(plan, steps=())  # the model of the problem has them
    rewrite(plan, fused)  # as in place, where an object of the model's may still hold the norm
    gone = {id(problem.model.get_submodule(replacement.names[0])) for replacement in plan.replacements}
    expected = [(node.operator, node.numbers) for node in problem.main.nodes if id(node.call.module) not in gone]
    try:
        graph = capture(fused, *problem.main.call.inputs, known=RULES).graph
    except InputError:
        return False
    problem.prepare(fused, graph)
    created = [name for edit in plan.edits if edit.created for name in edit.names]
    made = {graph.leaves[name] for name in created if name in graph.leaves}
    ran = []
    for node in graph.nodes:
        if made.issuperset(node.inputs) and node.inputs:
            made.update(node.outputs)  # parts of a bias that the original does not have
        else:
            ran.append((node.operator, node.numbers))
    return ran == expected
