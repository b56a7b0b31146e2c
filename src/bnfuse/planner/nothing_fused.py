"""What the caller is told when no norm goes: the commonest reason, and what to do about it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload

from bnfuse.fusion_plan import Plan
from bnfuse.model.quantisation import is_prepared
from bnfuse.model.wrappers import HOOK_OF_ACCELERATE
from bnfuse.reasons import CALLER_KEEPS, CAUSES, DID_NOT_RUN, IS_FUNCTION_CALL


def nothing_fused(plan: Plan, model: object) -> str:
    """A warning where a plan removes nothing; "" if it removes something, or the caller keeps every norm.

    Args:
        model: the model that the plan was made for, or an exported program.
    """
    kept = [decision for decision in plan.kept if decision.reasons[0].code != CALLER_KEEPS.code]
    name = type(model).__name__
    if plan.steps:
        return ""
    if not plan.decisions:
        return f"{name} holds no batch norm, so nothing was fused: the model that comes back is as it was."
    if plan.fused or not kept:
        return ""
    found = [{reason.code: reason for reason in decision.reasons} for decision in kept]
    [(code, count)] = Counter(code for reasons in found for code in reasons).most_common(1)
    example = next(reasons[code] for reasons in found if code in reasons)
    if isinstance(model, nn.Module) and is_prepared(model):
        why = "The model is prepared for quantisation: what was measured with the norms does not fit without them."
        advice = "Fuse first, then prepare the fused model; or let convert fold the norms after training."
    elif _is_exported(model) and code == IS_FUNCTION_CALL.code:
        why = "The norms that are left in the graph stand in an inner graph, or are given computed parameters."
        advice = "Fuse program.run_decompositions({}); or fuse the model first, and export the fused one."
    elif isinstance(model, nn.Module) and any(HOOK_OF_ACCELERATE in module.__dict__ for module in model.modules()):
        why = "Its layers run inside hooks of accelerate (device_map), which would be lost with the norms."
        advice = (
            "Remove them with accelerate.hooks.remove_hook_from_module(model, recurse=True), fuse the model on one "
            "device, and dispatch it again."
        )
    elif code == DID_NOT_RUN.code and count == len(kept):
        why = "None of its batch norms ran on the inputs: its forward leads past them, as that of a wrapper does."
        inner = _common_child([decision.norm for decision in kept])
        place = f"such as model.{inner}" if inner else "the one whose forward calls the norms"
        advice = f"Fuse the model inside, {place}, and put the fused one into its place; or pass other inputs."
    elif code == IS_FUNCTION_CALL.code:
        why = "The code calls F.batch_norm as a function, and nothing in a module can make that call go away."
        advice = "Call a module instead, such as nn.BatchNorm2d, with the same parameters and statistics."
    else:
        why = f"{f'The commonest reason of the {len(kept)}' if len(kept) > 1 else 'The reason'}: {example}."
        known = CAUSES[code].advice if code in CAUSES else "Nothing."
        advice = "" if known == "Nothing." else f"What can be done: {known}"
    first = f"No batch norm of {name} was fused."
    return "\n".join(filter(None, [first, why, advice, "print(bnfuse.plan(model, inputs)) tells why each norm stays."]))


def _common_child(names: list[str]) -> str:
    """The child of the model that holds all of the modules, "" if there is none."""
    first = {name.partition(".")[0] for name in names}
    return first.pop() if len(first) == 1 and all("." in name for name in names) else ""


def _is_exported(model: object) -> bool:
    if not isinstance(model, torch.fx.GraphModule):
        return isinstance(model, torch.export.ExportedProgram)
    return any(isinstance(node.target, (OpOverload, HigherOrderOperator)) for node in model.graph.nodes)
