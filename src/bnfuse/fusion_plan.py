"""A plan: what fusing a model would do, to be looked at, vetoed and applied."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bnfuse.changes import Changes, Decision
from bnfuse.errors import FusionError
from bnfuse.model.wrappers import checked, unwrap
from bnfuse.report.text import decisions_text
from bnfuse.transaction import fused_copy, rewrite


@dataclass(frozen=True, kw_only=True)
class Plan(Changes):
    """Everything that fusing a model would do. Printing it gives a table with one line for each norm.

    Attributes:
        model: the class of the model.
        decisions: one for each norm, in the order of the model.
        unseen: what the calls that it was made from did not show, in words: arguments that were never given, norms that
            did not run. On such calls nothing is promised.
        witness: for every tensor that the plan was made from, by name, a number that tells whether it has changed.
    """

    model: str
    decisions: tuple[Decision, ...]
    unseen: tuple[str, ...] = ()
    witness: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def fused(self) -> tuple[Decision, ...]:
        """The norms that go."""
        return tuple(decision for decision in self.decisions if decision.fused)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The norms that stay."""
        return tuple(decision for decision in self.decisions if not decision.fused)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the contents of the edits."""
        return {
            "model": self.model,
            "norms": len(self.decisions),
            "fused": len(self.fused),
            "kept": len(self.kept),
            "decisions": [decision.to_dict() for decision in self.decisions],
            "edits": [
                {"names": list(edit.names), "shape": list(edit.shape), "created": edit.created} for edit in self.edits
            ],
            "out_of_place": list(self.out_of_place),
            "unseen": list(self.unseen),
        }

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """Carry the plan out on the model that it was made for, or on a copy of it.

        Args:
            model: the model that the plan was made for.
            inplace: change ``model`` itself instead of a copy.

        Returns:
            The fused model, in evaluation mode.

        Raises:
            FusionError: the model is not the one that the plan was made for, or its parameters have changed since.
        """
        inner, wrap = unwrap(checked(model))
        self._check(inner)
        if inplace:
            rewrite(self, inner)
        target = inner if inplace else fused_copy(self, inner)
        target.eval()
        return model if inplace else wrap(target)

    def _check(self, model: nn.Module) -> None:
        if type(model).__name__ != self.model:
            raise FusionError(
                f"The plan was made for another model:\n  got:      {type(model).__name__}\n  expected: {self.model}"
            )
        for name, expected in self.witness.items():
            path, _, place = name.rpartition(".")
            try:
                tensor = getattr(model.get_submodule(path), place)
            except AttributeError:
                raise FusionError(f"The plan does not fit the model: it holds no {name}. Make a new plan.") from None
            if tensor is None or not (total(tensor) == expected or math.isnan(expected)):
                raise FusionError(
                    f"{name} has changed since the plan was made. Make a new plan for the model as it is."
                )

    def __str__(self) -> str:
        return decisions_text(self.model, self.decisions)


def total(tensor: torch.Tensor) -> float:
    """A number that tells whether a tensor has changed: the float64 sum of its elements."""
    return float(tensor.detach().sum(dtype=torch.float64))
