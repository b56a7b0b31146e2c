"""Constants that the code of a model makes, in its own precision, and the same ones in a run in float64.

A plan is made from the numbers that the model computes with: ``torch.full((), 0.1, dtype=x.dtype)`` is 0.09998 in a
float16 model, and what a norm's shift has to become behind it follows from that number. In a run in float64 the same
code makes 0.1, for which the plan was not made, and a right plan would seem wrong by 2e-4. So the constants of a run in
the model's own precision are recorded, and a run in float64 gets these, widened.

A constant is a floating tensor that an operator makes of no other (``full``, ``linspace``, ``torch.tensor``), or a
Python number that is read from a tensor which follows from constants and parameters alone. What ``torch.tensor`` is
given may depend on the inputs unseen, so a constant takes only the place of one that is the same but for its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from bnfuse.model.copying import held_tensors
from bnfuse.model.pytree import tensors
from bnfuse.model.sandbox import Mode
from bnfuse.operators import operator_of

_ROUNDINGS = 4.0
"""So many units in the last place of its dtype may a constant differ from the same one in float64."""

_LIFT = torch.ops.aten.lift_fresh.default


@dataclass(frozen=True)
class _Constant:
    """One constant: what made or read it, a copy in float64, and the unit in the last place of its largest element."""

    operator: str
    value: Tensor
    unit: Tensor


class Constants(Mode):
    """Records the constants of a run, and puts those of another run in their place if one is given.

    Args:
        model: the model that runs.
        followed: the constants of the run to follow.

    Attributes:
        made: the constants of this run, in the order of the run.
    """

    def __init__(self, model: nn.Module, followed: Constants | None = None) -> None:
        super().__init__()
        self.made: list[_Constant] = []
        self._followed = followed
        self._place = 0  # behind the last constant that was taken from the other run
        self._constant = WeakIdKeyDictionary(dict.fromkeys(held_tensors(model).values(), True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = [] if func is _LIFT else [tensor for _, tensor in tensors((args, kwargs))]
        if not all(tensor in self._constant for tensor in given):
            for tensor in given if operator_of(func).written else ():
                self._constant.pop(tensor, None)
            return output
        if isinstance(output, float) and given:
            taken = self._taken(str(func), torch.tensor(output, dtype=torch.float64, device="cpu"), given[0].dtype)
            return output if taken is None else taken.item()
        if isinstance(output, Tensor) and output.is_floating_point() and not given:
            taken = self._taken(str(func), output.double(), output.dtype)
            if taken is not None:
                output = torch.empty_like(output).copy_(taken)
        for _, tensor in tensors(output):
            self._constant[tensor] = True
        return output

    def _taken(self, operator: str, value: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Record a constant; returns the one of the other run that is the same but for its rounding, if any."""
        if not value.numel() or not dtype.is_floating_point:
            return None
        self.made.append(_Constant(operator, value.clone(), torch.finfo(dtype).eps * value.abs().amax()))
        for place, other in enumerate(self._followed.made[self._place :] if self._followed else (), self._place + 1):
            same = other.operator == operator and other.value.shape == value.shape
            if same and bool(((value - other.value).abs() <= _ROUNDINGS * other.unit).all()):
                self._place = place
                return other.value
        return None
