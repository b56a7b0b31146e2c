"""Other tools beside: what they remove from the same model, and whether its outputs stay the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfuse.model.describe import first_line
from bnfuse.model.sandbox import run
from bnfuse.tools.census.ledger import Rival
from bnfuse.verify.float64 import InFloat64
from bnfuse.verify.measure import compare_outputs


def torch_fx(model: nn.Module) -> nn.Module:
    """``torch.fx.experimental.optimization.fuse``, PyTorch's own."""
    from torch.fx.experimental.optimization import fuse

    fused: nn.Module = fuse(model)
    return fused


TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {"torch.fx": torch_fx}


def run_all(model: nn.Module, inputs: tuple[Any, ...], exact: object, widened: bool) -> Mapping[str, Rival]:
    """Run every tool on a copy of a float64 model.

    Args:
        model: in float64 and in evaluation mode.
        inputs: positional arguments, in float64.
        exact: what the model gives for them.
        widened: whether casts in its code are to be widened to float64.
    """
    return {name: _tried(tool, model, inputs, exact, widened) for name, tool in TOOLS.items()}


def _tried(
    tool: Callable[[nn.Module], nn.Module], model: nn.Module, inputs: tuple[Any, ...], exact: object, widened: bool
) -> Rival:
    before, _ = counted_run(model, inputs, widened)
    try:
        after, found = counted_run(tool(copy.deepcopy(model)).eval(), inputs, widened)
    except Exception as error:  # noqa: BLE001 (a tool that fails is a result)
        return Rival(failure=first_line(error)[:200])
    outputs = compare_outputs(exact, found).outputs
    if any(output.problem for output in outputs):
        return Rival(before - after)
    return Rival(before - after, max((output.relative_l2 for output in outputs if not output.exact), default=0.0))


def counted_run(model: nn.Module, inputs: tuple[Any, ...], widened: bool) -> tuple[int, Any]:
    """How many norms do something, and what the model returns."""
    counter = _Counter(model)
    with InFloat64() if widened else nullcontext():
        output = run(model, inputs, {}, 0, counter)
    return len(counter.read), output


class _Counter(TorchDispatchMode):
    """Counts the norms by their variances, as far as an operator reads them: a traced model has no norm modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        named = (*model.named_buffers(), *model.named_parameters())
        self.variances = {id(tensor) for name, tensor in named if name.endswith("running_var")}
        self.read: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        self.read |= {id(argument) for argument in given if isinstance(argument, Tensor)} & self.variances
        return func(*args, **(kwargs or {}))
