"""Discrete choices of a run, and repeating them in another run, so that two runs stay comparable despite near ties.

A detector sorts its boxes by score and drops those that overlap a better one. Where two scores nearly tie, the last bit
tells which comes first. From there on the outputs of two runs cannot be compared: whole boxes have changed places.
Between such choices the model is continuous. So the choices of one run are recorded, with the numbers that each was
made from, and another run repeats them: whatever it chooses itself is replaced by the recorded choice. Then both runs
compute the same continuous function. Their outputs can be compared, and so can the numbers that the choices were made
from. If these are no further apart than rounding brings them, it is also rounding that made the runs choose
differently.

A choice is an operator that makes integers, booleans or Python numbers of floating tensors (``topk``, ``argmax``,
``nms``, ``>``, ``item``), or whose floating result is not continuous (``floor``, ``sign``). Where an operator returns
both, such as ``sort``, its floating results stay those of the run itself: sorted values hardly depend on how a near tie
was resolved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from bnfuse.model.pytree import tensors
from bnfuse.model.sandbox import Mode

_DISCONTINUOUS = frozenset(
    {"ceil", "fix", "floor", "floor_divide", "fmod", "frac", "heaviside", "remainder", "round", "sgn", "sign", "trunc"}
)
"""Operators whose floating results jump."""


@dataclass(frozen=True)
class _Choice:
    """One choice.

    Attributes:
        operator: the name of the operator.
        given: copies of the floating tensors that it read.
        results: copies of its results; None for a result that is not discrete.
    """

    operator: str
    given: list[Tensor]
    results: list[Any]


class DiscreteChoices(Mode):
    """Records every discrete choice of a run, and replaces it by that of another run if one is given.

    Args:
        followed: the choices of the run to follow.

    Attributes:
        made: the choices of this run, with its own results.
        changed: whether the followed run chose differently somewhere.
    """

    def __init__(self, followed: DiscreteChoices | None = None) -> None:
        super().__init__()
        self.followed = followed
        self.made: list[_Choice] = []
        self.changed = False
        self._diverged = False

    @property
    def followed_to_the_end(self) -> bool:
        """Whether this run made choices of the same operators and kinds, in the same order, as the followed run."""
        return self.followed is not None and not self._diverged and len(self.made) == len(self.followed.made)

    @property
    def given(self) -> list[list[Tensor]]:
        """The floating tensors that each choice was made from."""
        return [choice.given for choice in self.made]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.unrolled(func, args, kwargs)
        floating = [tensor for _, tensor in tensors((args, kwargs)) if _is_floating(tensor)]
        if not floating or not isinstance(func, torch._ops.OpOverload) or _reads_no_values(func):
            return func(*args, **kwargs)
        in_place = func._schema.is_mutable
        if in_place:  # copied before the operator overwrites them
            floating = [tensor.clone() for tensor in floating]
        output = func(*args, **kwargs)
        several = isinstance(output, (tuple, list))
        results = output if several else [output]
        discontinuous = _is_discontinuous(func, kwargs)
        own = [_copy(result) if _is_discrete(result, discontinuous) else None for result in results]
        if all(result is None for result in own):
            return output
        given = floating if in_place else [tensor.clone() for tensor in floating]
        self.made.append(_Choice(str(func), given, own))
        if self.followed is None or self._diverged:
            return output
        wanted = self._results_to_follow(own, in_place)
        if wanted is None:
            self._diverged = True
            return output
        replaced = [
            result if other is None else self._replaced(result, other, in_place)
            for result, other in zip(results, wanted, strict=True)
        ]
        return type(output)(replaced) if several else replaced[0]

    def _results_to_follow(self, own: list[Any], in_place: bool) -> list[Any] | None:
        """The results of the same choice in the followed run; None if that run made another choice here."""
        assert self.followed is not None
        place = len(self.made) - 1
        if place >= len(self.followed.made):
            return None
        other = self.followed.made[place]
        if other.operator != self.made[place].operator or list(map(_kind, own)) != list(map(_kind, other.results)):
            return None
        if in_place and any(a.shape != b.shape for a, b in zip(own, other.results, strict=True) if a is not None):
            return None
        return other.results

    def _replaced(self, result: Any, wanted: Any, in_place: bool) -> Any:
        """The followed run's result, in the dtype of this run's own ``result`` and, if in place, in its memory."""
        if not isinstance(wanted, Tensor):
            self.changed |= result != wanted
            return wanted
        wanted = wanted.to(result.dtype, copy=True)
        self.changed |= not torch.equal(result, wanted)
        return result.copy_(wanted) if in_place else wanted


def _reads_no_values(func: torch._ops.OpOverload) -> bool:
    """Whether an operator makes its result without reading values, or only reinterprets their bits."""
    name = func._schema.name.partition("::")[2]
    return name.startswith("new_") or name.endswith("_like") or func is torch.ops.aten.view.dtype


def _is_discontinuous(func: torch._ops.OpOverload, kwargs: dict[str, Any]) -> bool:
    name = func._schema.name.partition("::")[2].rstrip("_")
    return name in _DISCONTINUOUS or kwargs.get("rounding_mode") is not None


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_discrete(result: Any, discontinuous: bool) -> bool:
    """Whether a result is a choice; a floating tensor is only if the operator is ``discontinuous``."""
    if isinstance(result, Tensor):
        return discontinuous or not _is_floating(result)
    return isinstance(result, (bool, int, float, complex))


def _copy(result: Any) -> Any:
    return result.clone() if isinstance(result, Tensor) else result


def _kind(result: Any) -> type | None:
    return None if result is None else Tensor if isinstance(result, Tensor) else type(result)
