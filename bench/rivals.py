"""The other ways to get rid of batch norms, and whether what they give is right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

from bnfuse.fusion_plan import Plan
from bnfuse.transaction import rewrite
from bnfuse.verify.measure import compare_outputs

WRONG = 1e-2
"""Relative error of an output that no rounding in float32 explains."""


def fx_fused(model: nn.Module) -> nn.Module:
    """``torch.fx`` fusion of a copy."""
    return optimization.fuse(model)


def jit_optimised(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """``torch.jit.optimize_for_inference`` of the traced model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing remarks on every size that is read
        return torch.jit.optimize_for_inference(torch.jit.trace(model, x))


def without_norms(model: nn.Module, plan: Plan, biases: bool = False) -> nn.Module:
    """A copy without the norms that the plan removes, and otherwise unchanged: wrong, and as fast as fusing can get.

    Args:
        biases: give the layers those parameters that the plan adds to them, as zeros (biases) and ones (gains).
    """
    bare = copy.deepcopy(model)
    edits = [replace(edit, factors=()) for edit in plan.edits if edit.created] if biases else []
    rewrite(replace(plan, edits=tuple(edits)), bare)
    return bare.eval()


def attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What ``make`` returns and "", or None and why it failed."""
    try:
        return make(), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        text = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {text[:200]}"


def is_right(expected: Any, got: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    return all(output.within(WRONG) for output in compare_outputs(expected, got).outputs)


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
