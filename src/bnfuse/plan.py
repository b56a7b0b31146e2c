"""What fusing a model would do, as data: a decision for every norm, and the edits that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bnfuse.units import Unit

if TYPE_CHECKING:
    from torch import nn

Handler = Callable[["nn.Module", torch.Tensor, torch.Tensor], None]
"""``handler(layer, scale, shift)``: changes the layer so that it gives ``scale*y + shift`` where it gave y."""


@dataclass(frozen=True)
class Reason:
    """Why a norm stays: what refused, and where.

    Attributes:
        text: the reason in words.
        operator: the operator that refused, None if it was no operator.
        module: the module that ran it.
        direction: "backward", "forward" or "beside", the way that was tried; None if none was.
    """

    text: str
    operator: str | None = None
    module: str | None = None
    direction: str | None = None

    def __str__(self) -> str:
        where = " in ".join(part for part in (self.operator, self.module) if part)
        text = f"{where}: {self.text}" if where else self.text
        return f"{self.direction}: {text}" if self.direction else text


@dataclass(frozen=True)
class Decision:
    """What happens to one norm.

    Attributes:
        norm: the module's name, or the operator and where it ran for a norm that is no module.
        kind: the class of the norm.
        channels: how many channels it normalises.
        fused: True if it goes.
        direction: "backward" (into what comes before it), "forward", "both" (the scale one way, the shift the other)
            or "beside" (into a layer that reads what the norm reads), None if it stays.
        into: the names of the layers whose parameters take it up.
        reasons: why it stays, one for each way that was tried; empty if it goes.
    """

    norm: str
    kind: str
    channels: int
    fused: bool
    direction: str | None = None
    into: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "norm": self.norm,
            "kind": self.kind,
            "channels": self.channels,
            "fused": self.fused,
            "direction": self.direction,
            "into": list(self.into),
            "reasons": [vars(reason) | {"message": str(reason)} for reason in self.reasons],
        }


@dataclass(frozen=True)
class Edit:
    """New contents of one parameter: ``scale*old + shift`` (and what is added to single entries) for each factor in
    turn, in float64, rounded once.

    Attributes:
        names: every name of the parameter.
        shape: its shape.
        created: True for a bias or gain that the layer does not have yet (old is 0 for a bias, 1 for a gain).
        handler: for a layer that a handler looks after (then the names are the layer's), that handler.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    factors: tuple[Unit, ...]
    created: bool = False
    handler: Handler | None = None


@dataclass(frozen=True)
class Replacement:
    """A norm module that goes, under all of its names; ``keep`` names its children that stay in its place."""

    names: tuple[str, ...]
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that fusing a model would do. Printing it gives a table with one line for each norm.

    Attributes:
        model: the class of the model.
        decisions: one for each norm, in the order of the model.
        edits: the parameters that change.
        replacements: the norm modules that go.
        out_of_place: names of activations that no longer work in place, since without the norm before them they
            would overwrite a tensor that is still read.
    """

    model: str
    decisions: tuple[Decision, ...]
    edits: tuple[Edit, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    out_of_place: tuple[str, ...] = ()
    witness: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def fused(self) -> tuple[Decision, ...]:
        """The norms that go."""
        return tuple(decision for decision in self.decisions if decision.fused)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The norms that stay."""
        return tuple(decision for decision in self.decisions if not decision.fused)

    def does_the_same(self, other: Plan) -> bool:
        """True if both remove the same norms by the same edits, up to the rounding of float64."""
        mine, theirs = ({edit.names: edit for edit in plan.edits} for plan in (self, other))
        return (
            [decision.fused for decision in self.decisions] == [decision.fused for decision in other.decisions]
            and set(self.replacements) == set(other.replacements)
            and mine.keys() == theirs.keys()
            and all(_same_edit(edit, theirs[names]) for names, edit in mine.items())
        )

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
        from bnfuse.api import apply_plan

        return apply_plan(self, model, inplace)

    def __str__(self) -> str:
        from bnfuse.report.text import plan_text

        return plan_text(self)


def _same_edit(a: Edit, b: Edit) -> bool:
    same = (a.names, a.shape, a.created, a.handler) == (b.names, b.shape, b.created, b.handler)
    return (
        same
        and len(a.factors) == len(b.factors)
        and all(x.inverse == y.inverse and x.same_as(y) for x, y in zip(a.factors, b.factors, strict=True))
    )


def total(tensor: torch.Tensor) -> float:
    """A number that tells whether a tensor has changed: the float64 sum of its elements."""
    return float(tensor.detach().sum(dtype=torch.float64))
