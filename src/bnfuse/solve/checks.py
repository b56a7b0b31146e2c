"""What is checked when a trial has come to rest: edits that every use of a parameter agrees on, numbers that fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.reasons import Reason
from bnfuse.solve.network import Network, Refusal, edited
from bnfuse.units import (
    SAFE_SCALE,
    NotInvertibleError,
    Unit,
    multiply,
)

_LARGEST_SHIFT = {torch.float64: 1e7, torch.float32: 1e4, torch.float16: 100.0, torch.bfloat16: 100.0}
"""The largest shift, in the units that values had at first, of a tensor that something else still reads."""


def check_edits(network: Network, edits: Mapping[Value, Mapping[Node, Unit]]) -> None:
    """An edited parameter must be editable, and every use of it must ask for the same edit."""
    for value, requests in edits.items():
        if value.pinned is not None or value.kind not in (Kind.PARAMETER, Kind.ABSENT, Kind.LAYER):
            why = value.pinned or reasons.IS_NO_PARAMETER.reason()
            raise Refusal(reasons.WEIGHT_FIXED.reason(why=why, parameter=_label(value)), False)
        node, unit = next(iter(requests.items()))
        for other in value.consumers:
            if other not in requests or not agree(unit, requests[other]):
                raise Refusal(not_shared(value, node, other), False)
        if value in network.edits and _scaled_up(network, value, unit) > SAFE_SCALE:
            raise Refusal(
                reasons.UNDOES_ZERO_SCALE.reason(*node.place), True
            )  # little by little, with what went before
        if value.dtype is torch.float16 and not _in_range(network, value, unit):
            raise Refusal(reasons.OUT_OF_RANGE.reason(*node.place, parameter=_label(value), dtype=value.dtype), True)


def check_shifts(composed: Mapping[Value, tuple[Tensor | None, Tensor | None]]) -> None:
    """A shift that is much larger than what is left of the values takes away their digits."""
    looked_at = set()
    for value, (scale, shift) in composed.items():
        if scale is None or shift is None or (id(scale), id(shift), value.dtype) in looked_at:
            continue
        looked_at.add((id(scale), id(shift), value.dtype))
        alive = scale != 0
        largest = float((shift.abs() / scale.abs().where(alive, torch.inf)).amax())
        if largest > _LARGEST_SHIFT.get(value.dtype, 0.0):
            where = (None, None) if value.producer is None else value.producer.place
            raise Refusal(reasons.SHIFT_TOO_LARGE.reason(*where, ratio=largest), False)


def _scaled_up(network: Network, value: Value, unit: Unit) -> float:
    """The largest factor that an element of a parameter is multiplied by in all."""
    scale: Tensor | None = None
    for other in (*network.edits[value], unit):
        scale = multiply(scale, other.scale)
    return 1.0 if scale is None or not scale.numel() else float(scale.abs().amax())


def _in_range(network: Network, value: Value, unit: Unit) -> bool:
    if value.kind is Kind.LAYER:
        return True
    before = network.content(value)
    after = edited(before, unit).where(torch.isfinite(before), 0.0)  # a bound may be infinite
    return float(after.abs().amax()) <= torch.finfo(value.dtype).max


def not_shared(parameter: Value, node: Node, other: Node) -> Reason:
    """The reason of a parameter whose uses ask for different edits."""
    return reasons.SHARED_WEIGHT.reason(*node.place, parameter=_label(parameter), other=other)


def _label(parameter: Value) -> str:
    return " = ".join(parameter.names) or "a weight"


def agree(a: Unit, b: Unit) -> bool:
    """True if two units are the same up to the rounding of float64."""
    try:
        return a.same_as(b)
    except NotInvertibleError:
        return False
