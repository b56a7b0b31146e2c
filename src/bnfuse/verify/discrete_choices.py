"""Following the decisions of another run: what makes runs comparable that rounding has sent different ways.

A detector sorts its boxes by score and drops those that overlap a better one.  Where two scores nearly tie, the last
bit decides which comes first, and from then on the outputs of two runs are not near each other: whole boxes have
changed places.  Between such decisions the model is continuous.  So the decisions of one run are written down, with
the numbers that each was taken from, and another run follows them: whatever it decides itself is replaced by what was
decided there.  Then both are the same continuous function, their outputs can be compared as those of any other model,
and so can the numbers that were decided from.  If these are no further apart than rounding brings them, rounding is
also what made the runs decide differently.

A decision is an operator that makes whole numbers, truth values or Python numbers of floating tensors (``topk``,
``argmax``, ``nms``, ``>``, ``item``), or that jumps by itself (``floor``, ``sign``).  The floating results of the
former stay the run's own: those of ``sort`` are the same numbers in either order, but for the tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfuse.model.pytree import tensors
from bnfuse.model.sandbox import Mode

_JUMPS = frozenset(
    {"ceil", "fix", "floor", "floor_divide", "fmod", "frac", "heaviside", "remainder", "round", "sgn", "sign", "trunc"}
)
"""Operators of floating results that are not continuous."""


@dataclass(frozen=True)
class _Decision:
    """One decision: the operator, copies of the floating tensors that it was given, and copies of its results."""

    operator: str
    given: list[Tensor]
    results: list[Any]


class Decisions(Mode):
    """Writes down every decision of a run, and replaces each by that of another run if one is given.

    Attributes:
        found: the decisions of this run, the results being its own.
        changed: whether the other run had decided differently somewhere.
    """

    def __init__(self, followed: Decisions | None = None) -> None:
        super().__init__()
        self.followed = followed
        self.found: list[_Decision] = []
        self.changed = False
        self._lost = False

    @property
    def followed_to_the_end(self) -> bool:
        """Whether this run took the same decisions in the same order as the other, as far as their kind goes."""
        return self.followed is not None and not self._lost and len(self.found) == len(self.followed.found)

    @property
    def given(self) -> list[list[Tensor]]:
        """The floating tensors that each decision was taken from."""
        return [decision.given for decision in self.found]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        floating = [tensor for _, tensor in tensors((args, kwargs)) if _is_floating(tensor)]
        if not floating or not isinstance(func, torch._ops.OpOverload) or _decides_nothing(func):
            return func(*args, **kwargs)
        in_place = func._schema.is_mutable
        if in_place:  # what was decided from may be overwritten
            floating = [tensor.clone() for tensor in floating]
        output = func(*args, **kwargs)
        several = isinstance(output, (tuple, list))
        jumps = _jumps(func, kwargs)
        own = [_copy(result) if _is_decided(result, jumps) else None for result in (output if several else [output])]
        if all(result is None for result in own):
            return output
        given = floating if in_place else [tensor.clone() for tensor in floating]
        self.found.append(_Decision(str(func), given, own))
        if self.followed is None or self._lost:
            return output
        wanted = self._decided_there(own, in_place)
        if wanted is None:
            self._lost = True
            return output
        taken = [
            result if other is None else self._taken(result, other, in_place)
            for result, other in zip(output if several else [output], wanted, strict=True)
        ]
        return type(output)(taken) if several else taken[0]

    def _decided_there(self, own: list[Any], in_place: bool) -> list[Any] | None:
        """The results of the same decision in the run that is followed; None if that took another way."""
        assert self.followed is not None
        place = len(self.found) - 1
        if place >= len(self.followed.found):
            return None
        other = self.followed.found[place]
        if other.operator != self.found[place].operator or list(map(_kind, own)) != list(map(_kind, other.results)):
            return None
        if in_place and any(a.shape != b.shape for a, b in zip(own, other.results, strict=True) if a is not None):
            return None
        return other.results

    def _taken(self, result: Any, wanted: Any, in_place: bool) -> Any:
        """What was decided elsewhere, in the place of this run's own result."""
        if not isinstance(wanted, Tensor):
            self.changed |= result != wanted
            return wanted
        wanted = wanted.to(result.dtype, copy=True)
        self.changed |= not torch.equal(result, wanted)
        return result.copy_(wanted) if in_place else wanted


def _decides_nothing(func: torch._ops.OpOverload) -> bool:
    """Whether an operator reads no contents, or bits as they are."""
    name = func._schema.name.partition("::")[2]
    return name.startswith("new_") or name.endswith("_like") or func is torch.ops.aten.view.dtype


def _jumps(func: torch._ops.OpOverload, kwargs: dict[str, Any]) -> bool:
    name = func._schema.name.partition("::")[2].rstrip("_")
    return name in _JUMPS or kwargs.get("rounding_mode") is not None


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_decided(result: Any, everything: bool) -> bool:
    if isinstance(result, Tensor):
        return everything or not _is_floating(result)
    return isinstance(result, (bool, int, float, complex))


def _copy(result: Any) -> Any:
    return result.clone() if isinstance(result, Tensor) else result


def _kind(result: Any) -> type | None:
    return None if result is None else Tensor if isinstance(result, Tensor) else type(result)
