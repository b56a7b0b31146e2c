"""Which of many norms, or steps, are to blame, where a plan with all of them does something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

_Suspect = TypeVar("_Suspect")

_MANY_GROUPS = 4
"""So many groups of norms that all fail say that it is not one norm or another."""

_FEW = 8
"""So many norms are told apart whatever the number of trials."""


def culprits(
    norms: Sequence[_Suspect], holds: Callable[[Sequence[_Suspect]], bool], limited: bool = True
) -> list[list[_Suspect]]:
    """Those of the norms (or steps) that cannot go, or not surely.

    They are tried in halves, and those of a half that fails in halves again; where the first half holds, the
    second one is to blame.

    Args:
        norms: they cannot all go.
        holds: whether these of the norms can go while the others stay.
        limited: give up where nearly every group fails, for trials that run the whole model: the norms then have
            something in common that no further halving tells, and all that are left stay.

    Returns:
        Groups of norms that stay: of one where it is to blame, of several where it was not tried which of them are.
    """
    failing, found = [list(norms)], []
    while failing:
        found += [group for group in failing if len(group) == 1]
        tried = [group for group in failing if len(group) > 1]
        left = sum(map(len, tried))
        if limited and left > _FEW and (len(tried) > 2 * _MANY_GROUPS or len(tried) == len(failing) >= _MANY_GROUPS):
            return found + tried
        failing = []
        for group in tried:
            first, second = group[: len(group) // 2], group[len(group) // 2 :]
            first_holds = holds(first)
            failing += [second] if first_holds else [first]
            if not first_holds and not holds(second):
                failing.append(second)
    return found
