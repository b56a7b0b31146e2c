"""Steps that cost norms: those with which fewer norms go than without them.

A step gives nothing for free: the one layer that takes the place of several has one weight where there were several, a
padding where there was none in between, and what it merged in one place is nothing in another. A norm that could go
through the layers as they were may find no way through the new one. No step is worth that.

Each kind would have to foresee what the planner finds. So this is seen from the end: where a norm stays that goes
plainly, plans are made with fewer of the steps, until it is known which of them are to blame.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from bnfuse.changes import Decision, Step

Gone = Counter[str]
"""How many norms go, by their labels: norms that are no modules may share one."""


_FEW = 8
"""So many steps are told apart from those behind them."""


def gone(decisions: Iterable[Decision]) -> Gone:
    """The norms that go."""
    return Counter(decision.norm for decision in decisions if decision.fused)


def costly(steps: Sequence[Step], plainly: Gone, go_with: Callable[[Sequence[Step]], Gone]) -> list[Step]:
    """The steps without which more norms go.

    Args:
        steps: all of them.
        plainly: the norms that go without any.
        go_with: the norms that go with some of them.
    """
    known: dict[frozenset[int], Gone] = {}

    def goes(some: Sequence[Step]) -> Gone:
        key = frozenset(map(id, some))
        if key not in known:
            known[key] = go_with(some)
        return known[key]

    groups = _suspects(steps, lambda some: plainly <= goes(some))
    blamed: list[Step] = []
    most = goes(steps).total()
    for group in (*groups, [*itertools.chain(*groups)]):  # one may make others go for those that it costs
        rest = [step for step in steps if step not in blamed and step not in group]
        if goes(rest).total() > most:
            blamed, most = [step for step in steps if step not in rest], goes(rest).total()
    return blamed


def _suspects(steps: Sequence[Step], holds: Callable[[Sequence[Step]], bool]) -> list[list[Step]]:
    """Groups of steps without which the others cost nothing.

    Each costs something together with those before it that cost nothing; what is behind the last few is one group.

    This is not the search of :mod:`bnfuse.planner.culprits`, since no norm is lost to one of two steps alone where
    each leaves a way that the other closes.
    """
    found: list[list[Step]] = []
    good, left = list[Step](), [*steps]
    while left and not holds([*good, *left]):
        if len(found) == _FEW:
            return [*found, left]
        low, high = 0, len(left)  # with so many more all is well, with so many it is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds([*good, *left[:middle]]) else (low, middle)
        good += left[:low]
        found.append([left[low]])
        left = left[high:]
    return found
