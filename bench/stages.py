"""Where the time of ``bnfuse.fuse`` goes, measured from outside: its steps are wrapped with a clock for a while.

A step that runs within another counts for itself and not for the other, so that the stages add up.
"""

from __future__ import annotations

import functools
import pkgutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.timing import Clock
from bnfuse.tools.timing import Measure

STEPS = {
    "bnfuse.api.fused_copy": "copy",
    "bnfuse.planner.problem.captured": "capture",
    "bnfuse.planner.planner.solve": "solve",
    "bnfuse.planner.problem.CallInference.infer": "other calls",
    "bnfuse.planner.planner.needed_in_place": "assumptions",
    "bnfuse.api.rewrite": "rewrite",
    "bnfuse.api.InPlace": "rewrite",
    "bnfuse.api._verify": "verify",
    "bnfuse.planner.trying_plans.Trials.failure": "verify",
}
"""The steps by where they are looked up, and the stage that each belongs to."""

STAGES = (*dict.fromkeys(STEPS.values()), "other")


class Stages:
    """The seconds of each stage, summed over the calls since the last ``reset``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.within: list[float] = []
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def wrapped(self, stage: str, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same step; its time, without that of other steps within it, is added to the stage."""

        @functools.wraps(step)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            self.within.append(0.0)
            started = self.clock()
            try:
                return step(*args, **kwargs)
            finally:
                elapsed = self.clock() - started
                self.seconds[stage] += elapsed - self.within.pop()
                if self.within:
                    self.within[-1] += elapsed

        return clocked

    def of_total(self, seconds: float) -> dict[str, float]:
        """The stages of a call that took so many seconds; what no step accounts for is ``other``."""
        return self.seconds | {"other": seconds - sum(self.seconds.values())}


@contextmanager
def stages(clock: Clock) -> Iterator[Stages]:
    """Wrap the steps, and put them back.

    Raises:
        AttributeError: the library has no such step any more; ``STEPS`` must follow it.
    """
    found = Stages(clock)
    originals = []
    try:
        for path, stage in STEPS.items():
            name, _, attribute = path.rpartition(".")
            owner = pkgutil.resolve_name(name)
            original = getattr(owner, attribute)
            originals.append((owner, attribute, original))
            setattr(owner, attribute, found.wrapped(stage, original))
        yield found
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


def with_stages(measure: Measure, clocks: Stages, history: list[dict[str, float]]) -> Measure:
    """The same measure; the stages of every call are added to ``history``."""

    def measure_stages() -> float:
        clocks.reset()
        seconds = measure()
        history.append(clocks.of_total(seconds))
        return seconds

    return measure_stages


def median_stages(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median seconds of each stage; nothing if there was no call."""
    return {stage: statistics.median(call[stage] for call in history) for stage in STAGES} if history else {}
