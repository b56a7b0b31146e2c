"""Trying a plan on other inputs, where the code of the model may treat them in another way.

Code that looks at a size or at an element may do something else for another input, and code that keeps something for
the next call something else in the next call. Then the fused model is compared with the original on such inputs too.
That takes whole runs, so a plan that fails there is not taken apart norm by norm
(:mod:`bnfuse.planner.culprits`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bnfuse.fusion_plan import Plan
from bnfuse.model import pytree
from bnfuse.model.copying import copy_model
from bnfuse.model.sandbox import forked_random_state
from bnfuse.planner.larger_inputs import OtherSizes
from bnfuse.transaction import fused_copy, rewrite
from bnfuse.verify.equivalence import same_outputs
from bnfuse.verify.reference import Reference


class OtherInputs:
    """Tries plans for one model; what the model itself gives is found out once for all of them.

    What is asked is whether a plan computes the same, not how precisely: differences that rounding makes, which flips
    near ties, are looked through in float64, with the plan carried out there (see :mod:`bnfuse.verify.equivalence`).
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: OtherSizes, stateful: bool
    ) -> None:
        """
        Args:
            model: the original.
            args, kwargs: inputs that it takes.
            sizes: what it does with inputs of other sizes.
            stateful: whether a second call may differ from the first.
        """
        self.model, self.inputs, self.sizes, self.stateful = model, (args, kwargs), sizes, stateful

    def holds(self, plan: Plan) -> bool:
        """True if the plan also holds for inputs with other values and of another size, and for a second call."""
        fused = fused_copy(plan, self.model)
        if self._second_call is not None:

            def fuse_twice(twice: nn.Module) -> nn.Module:
                assert isinstance(twice, _Twice)
                rewrite(plan, twice.model)
                return twice

            if not _agrees(self._second_call, _Twice(copy_model(fused)), fuse_twice):
                return False

        def fuse(wide: nn.Module) -> nn.Module:
            rewrite(plan, wide)
            return wide

        return self._other_call is None or _agrees(self._other_call, fused, fuse)

    @functools.cached_property
    def _second_call(self) -> Reference | None:
        """The second of two calls, if that may differ from the first."""
        return _reference(_Twice(copy_model(self.model)), *self.inputs) if self.stateful else None

    @functools.cached_property
    def _other_call(self) -> Reference | None:
        """A call with other inputs, the first of those that the model takes."""
        return next(filter(None, (_reference(self.model, *inputs) for inputs in self.sizes.inputs())), None)


class _Twice(nn.Module):
    """Calls a model twice and gives what the second call gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(2):
            given = pytree.map_tensors((args, kwargs), torch.clone)
            with forked_random_state():
                output = self.model(*given[0], **given[1])
        return output


def _reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reference | None:
    """What the model gives on these inputs; None if it does not take them."""
    reference = Reference(model, args, kwargs)
    try:
        reference.output  # noqa: B018 (kept there)
    except Exception:  # noqa: BLE001 (whatever a model raises on a size that it does not take)
        return None
    return reference


def _agrees(reference: Reference, fused: nn.Module, fuse_in_float64: Callable[[nn.Module], nn.Module]) -> bool:
    verdict = same_outputs(reference, fused, fuse_in_float64, algebra_only=True)
    return verdict.equal or verdict.nothing_compared
