"""What fusing a model changes, as data: a decision for every norm, and the edits that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
            or "beside" (into a layer that reads what the norm reads), "bake" or "merge" for one that such a step took
            along; None if it stays.
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


# Restructuring: other modules in old places ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """What a tensor that is made anew holds.

    Attributes:
        like: the name, in the model before the step, of a parameter or buffer that gives dtype, device and
            ``requires_grad``.
        exact: its contents in float64; None for those of ``like``.
    """

    like: str
    exact: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class NewLayer:
    """A layer of PyTorch's that is made anew.

    Attributes:
        kind: its class, one of `LAYERS`, such as "Conv2d".
        settings: the arguments of its constructor by name: numbers, texts, flags, and tuples of these.
        sources: what its parameters hold, by their names in it; empty for zeros.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Former:
    """A module that stood in the place before: the one itself ("") or one inside of it, by its name there."""

    path: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """An ``nn.Sequential`` of modules by their names in it."""

    parts: tuple[tuple[str, ModuleSpec], ...]


ModuleSpec = NewLayer | Former | Row
"""A module, as data."""

LAYERS = frozenset(
    {
        "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear", "Identity",
        "ReLU", "ZeroPad2d", "ReLU6", "SiLU", "GELU", "Sigmoid", "Tanh", "Hardswish", "Hardsigmoid", "Mish",
        "LeakyReLU", "ELU", "Nothing", "Clip",
    }
)  # fmt: skip
"""The classes of layers that may be made anew."""


@dataclass(frozen=True, eq=False)
class Placement:
    """A module that is put in the place of another, under all of its names.

    Attributes:
        names: the names of the place.
        module: what stands there then: a new layer, or a row of new and former ones.
    """

    names: tuple[str, ...]
    module: NewLayer | Row


@dataclass(frozen=True, eq=False)
class OwnTensor:
    """A tensor that a module computed, or had in common with another, and that becomes a parameter of its own.

    Attributes:
        names: the names of the tensor; all of them lead to one module.
        shape: its shape.
        source: what it holds, None for zeros.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    source: Source | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One change of the structure of a model, which changes no output.

    Attributes:
        kind: "bake", "untie", "merge" or "clip".
        subject: the name of the module that it is about.
        what: what becomes of it, in words.
        placements: the modules that are put in old places. They are made before the first of them is put there.
        tensors: the tensors that become parameters of their own.
        parameters: by how many numbers the parameters of the model grow.
        norms: the norms that it is done for, by their names before.
    """

    kind: str
    subject: str
    what: str
    placements: tuple[Placement, ...] = ()
    tensors: tuple[OwnTensor, ...] = ()
    parameters: int = 0
    norms: tuple[str, ...] = ()

    def __str__(self) -> str:
        price = f"{self.parameters:+,} parameters" if self.parameters else "no more parameters"
        return f"{self.kind} {self.subject}: {self.what} ({price})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without contents."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "what": self.what,
            "modules": [name for placement in self.placements for name in placement.names],
            "tensors": [name for tensor in self.tensors for name in tensor.names],
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class Unchanged:
    """What a restructuring that was asked for leaves as it is.

    Attributes:
        kind: of the restructuring.
        subject: the name of the module.
        reason: why.
    """

    kind: str
    subject: str
    reason: Reason

    def __str__(self) -> str:
        return f"no {self.kind} of {self.subject}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"kind": self.kind, "subject": self.subject, "reason": vars(self.reason) | {"message": str(self.reason)}}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Everything that is written to a model.

    Attributes:
        steps: changes of the structure, which come first, in their order; what the other changes name is there then.
        edits: the parameters that change.
        replacements: the norm modules that go.
        out_of_place: names of activations that no longer work in place, since without the norm before them they
            would overwrite a tensor that is still read.
    """

    steps: tuple[Step, ...] = ()
    edits: tuple[Edit, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    out_of_place: tuple[str, ...] = ()
