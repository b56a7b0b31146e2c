"""Times that can be compared: measured interleaved, so that other work of the machine disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Measure = Callable[[], float]
"""Does something once and returns the seconds that it took."""


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Measure:
    """A measure of ``work``; what it returns is freed when the time has been taken."""

    def measure() -> float:
        started = clock()
        result = work()
        elapsed = clock() - started
        del result
        return elapsed

    return measure


def interleaved(measures: Mapping[str, Measure], rounds: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Take every measure once in each round, and no two rounds in the same order.

    The first place goes round, and after each cycle the direction changes, so that none always follows the same other.

    Args:
        measures: what to measure, by name.
        rounds: how many rounds count.
        warm_up: how many rounds run before them and are forgotten.

    Returns:
        The seconds of each measure, one for each round that counts.

    >>> interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)
    {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    names = list(measures)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        cycle, first = divmod(turn, len(names))
        order = names[first:] + names[:first]
        for name in reversed(order) if cycle % 2 else order:
            elapsed = measures[name]()
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for PyTorch's operators inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
