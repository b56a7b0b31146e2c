"""What fusing a model changes, as data: a decision for every norm, and the edits that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnfuse.reasons import Reason
from bnfuse.units import Unit

Handler = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
"""``handler(layer, scale, shift)``: changes the layer so that it gives ``scale*y + shift`` where it gave y."""


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
            "reasons": [_reason_dict(reason) for reason in self.reasons],
        }


def _reason_dict(reason: Reason) -> dict[str, Any]:
    words = {name: value for name, value in vars(reason).items() if name != "step"}
    return words | {"message": str(reason)}


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
    """A norm module that goes, under all of its names.

    Attributes:
        names: its names.
        keep: the names, within it, of the children that stay in its place; "" is the module itself.
        ceiling: the shape of bounds that stand there, before what stays; empty for none.
    """

    names: tuple[str, ...]
    keep: tuple[str, ...] = ()
    ceiling: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Everything that is written to a model.

    Attributes:
        edits: the parameters that change.
        replacements: the norm modules that go.
        out_of_place: names of activations that no longer work in place, since without the norm before them they
            would overwrite a tensor that is still read.
    """

    edits: tuple[Edit, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    out_of_place: tuple[str, ...] = ()
